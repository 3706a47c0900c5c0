"""What a rank sends and receives: which collective, why, over which axis, how much."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """Which collective."""

    all_gather = "all-gather"
    reduce_scatter = "reduce-scatter"
    all_reduce = "all-reduce"
    send = "send"
    all_to_all = "all-to-all"


@dataclass(frozen=True, slots=True)
class Traffic:
    """All collectives of one purpose in a step: `calls` of them, `size` bytes together."""

    purpose: str
    kind: Kind
    axis: str
    calls: int
    size: int

    def sent(self, num_ranks: int) -> float:
        """Bytes that a rank sends if the collective runs around a ring of `num_ranks`."""
        share = (num_ranks - 1) / num_ranks
        factor = {Kind.all_reduce: 2 * share, Kind.send: 1.0}.get(self.kind, share)
        return factor * self.size
