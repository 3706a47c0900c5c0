"""Bytes that rows of experts take to other ranks and back: the formula of `parallel.row_routes`.

One microbatch of N tokens of D values, each with k choices among E experts over ep ranks, in one
layer; M = k N rows, or E times the capacity of all packed rows. Sizes are of whole messages, what a
rank keeps for itself included, on a rank that is sent as many rows as it sends: which rank gets how
many depends on routing, but all ranks of a group together send exactly this.

| message | bytes | when |
| --- | --- | --- |
| counts of rows, and a flag, in int64 | 8 (E + ep) | forward, without a capacity |
| flags | ep | forward, with a capacity and spikes |
| rows there | M D w, as spikes M (D + s) | forward |
| outputs home | M D w | forward |
| gradients home | M D w | backward |
| gradients there | M D w | backward |

w and s are the bytes of a value and of a scale.
"""

from __future__ import annotations

from dataclasses import dataclass

from models.dispatch import num_expert_rows
from models.expert_config import ExpertConfig

COUNT_BYTES = 8


@dataclass(frozen=True, slots=True)
class Crossing:
    """All-to-all calls and bytes of one layer and microbatch, forward and backward."""

    forward_calls: int
    forward_size: int
    backward_calls: int
    backward_size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Messages:
    """What a microbatch of `rows` packed rows of `length` tokens sends through one layer.

    `width` and `scale_width` are bytes of a value and of a spike's scale; None where rows travel as
    they are.
    """

    moe: ExpertConfig
    hidden_size: int
    rows: int
    length: int
    ep: int
    width: int
    scale_width: int | None = None

    def num_rows(self) -> int:
        """Rows of experts, those that only fill up included."""
        return num_expert_rows(self.moe, self.rows, self.length)

    def crossing(self) -> Crossing:
        """The formula."""
        plain = self.num_rows() * self.hidden_size * self.width
        there, told = plain, 0
        if self.scale_width is not None:
            there, told = self.num_rows() * (self.hidden_size + self.scale_width), self.ep
        if self.moe.capacity_factor is None:
            told = COUNT_BYTES * (self.moe.num_experts + self.ep)
        return Crossing(2 + (told > 0), told + there + plain, 2, 2 * plain)
