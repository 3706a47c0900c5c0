"""What a mixture-of-experts layer is: how many experts, how tokens choose, how load is balanced.

Typed values; no tensors, no I/O.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

from models.strict import STRICT


class RouterScore(Enum):
    """What makes a router's logits weights: all experts compete, or each stands alone."""

    softmax = "softmax"
    sigmoid = "sigmoid"


class Balance(Enum):
    """How load is kept even; what each means is in `models.balance`."""

    none = "none"
    row = "row"
    previous_step = "previous_step"
    bias = "bias"
    microbatch = "microbatch"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertConfig:
    """The feed-forward layers `e` (SpikingBrain report, sections 2.2 and 3.2, equations 15-17).

    Args:
        num_experts: routed experts, of which each token visits `top_k`.
        num_shared_experts: experts that every token visits.
        intermediate_size: inner channels of one expert; null is the dense layer's.
        score: how the router's logits become weights.
        renormalise: whether the chosen weights are divided by their sum.
        balance: see `models.balance`.
        balance_coefficient: weight of the balance loss.
        bias_update_rate: change a step of the selection bias (`balance=bias`).
        z_loss_coefficient: weight of the mean squared log-sum-exp of router logits.
        capacity_factor: tokens an expert takes of one row, as a multiple of an even share, in
            training; null takes all.
        tie_break_seed: of the order of experts with equal scores.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    num_experts: int = 16
    num_shared_experts: int = 1
    top_k: int = 1
    intermediate_size: int | None = None
    score: RouterScore = RouterScore.softmax
    renormalise: bool = False
    balance: Balance = Balance.row
    balance_coefficient: float = 1e-3
    bias_update_rate: float = 1e-3
    z_loss_coefficient: float = 0.0
    capacity_factor: float | None = None
    tie_break_seed: int = 0

    def __post_init__(self) -> None:
        if self.num_experts < 1:
            raise ValueError(f"moe.num_experts ({self.num_experts}) must be at least 1.")
        if self.num_shared_experts < 0:
            raise ValueError(
                f"moe.num_shared_experts ({self.num_shared_experts}) must be at least 0."
            )
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"moe.top_k ({self.top_k}) must be between 1 and moe.num_experts: got "
                f"{self.num_experts}. Lower top_k, or add experts."
            )
        if self.renormalise and self.top_k == 1:
            raise ValueError(
                "moe.renormalise (true) must come with moe.top_k above 1: got 1, whose weight is "
                "always 1 and gives the router no gradient. Set renormalise=false, or top_k=2."
            )
        if self.intermediate_size is not None and self.intermediate_size < 1:
            raise ValueError(
                f"moe.intermediate_size ({self.intermediate_size}) must be at least 1, or null for "
                "the dense layer's."
            )
        for name in ("balance_coefficient", "bias_update_rate", "z_loss_coefficient"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"moe.{name} ({getattr(self, name)}) must be at least 0.")
        if self.capacity_factor is not None and not self.capacity_factor > 0:
            raise ValueError(
                f"moe.capacity_factor ({self.capacity_factor}) must be above 0, or null for no "
                "limit."
            )
