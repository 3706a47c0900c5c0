"""What the mixers of a model are: rotary positions, the linear mixer, branches, sink tokens.

Typed values; no tensors, no I/O.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

from models.strict import STRICT


class RopeType(Enum):
    """How rotary angles are scaled (the field's `rope_type` words)."""

    default = "default"
    linear = "linear"
    llama3 = "llama3"
    yarn = "yarn"


SCALING_KEYS: dict[RopeType, tuple[str, ...]] = {
    RopeType.default: (),
    RopeType.linear: ("factor",),
    RopeType.llama3: (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    ),
    RopeType.yarn: (
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
        "mscale", "mscale_all_dim", "truncate",
    ),
}  # fmt: skip
"""Which keys each type reads."""
_ALL_SCALING_KEYS = frozenset(name for names in SCALING_KEYS.values() for name in names)


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Rotary position embedding of the softmax mixers; the linear mixer has none."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    theta: float = 1_000_000.0
    type: RopeType = RopeType.default
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if not self.theta > 0:
            raise ValueError(f"rope.theta ({self.theta}) must be above 0.")
        if not self.factor >= 1:
            raise ValueError(f"rope.factor ({self.factor}) must be at least 1.")
        for name in sorted(_ALL_SCALING_KEYS - set(SCALING_KEYS[self.type])):
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                kinds = [kind.value for kind in RopeType if name in SCALING_KEYS[kind]]
                raise ValueError(
                    f"rope.{name} ({getattr(self, name)}) has no effect with rope.type "
                    f"{self.type.value}. Set rope.type to {' or '.join(kinds)}, or leave it out."
                )


class FeatureMap(Enum):
    """What queries and keys of the linear mixer go through, so that they are not negative."""

    relu = "relu"
    sigmoid = "sigmoid"


class GateKind(Enum):
    """Where the decay of the linear mixer comes from: its own low-rank matrices, or the keys."""

    low_rank = "low_rank"
    key_tied = "key_tied"


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearAttentionConfig:
    """The gated linear mixer `L` (SpikingBrain report, section 2.2 and equations 10-11).

    With `gate=key_tied` (the 76B) keys and decays come from one u: `k = (1 - gate_floor)
    sigmoid(u - gate_offset)` and `g = 1 - k`. A positive offset starts with long memory; a floor is
    the smallest decay.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    feature_map: FeatureMap = FeatureMap.relu
    gate: GateKind = GateKind.low_rank
    gate_low_rank_dim: int = 16
    gate_logit_normalizer: float = 16.0
    gate_offset: float = 0.0
    gate_floor: float = 0.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.gate_low_rank_dim < 1:
            raise ValueError(
                f"linear.gate_low_rank_dim ({self.gate_low_rank_dim}) must be at least 1."
            )
        if not self.gate_logit_normalizer > 0:
            raise ValueError(
                f"linear.gate_logit_normalizer ({self.gate_logit_normalizer}) must be above 0: "
                "decays would grow the state."
            )
        if not self.norm_eps > 0:
            raise ValueError(f"linear.norm_eps ({self.norm_eps}) must be above 0.")
        if not 0 <= self.gate_floor < 1:
            raise ValueError(f"linear.gate_floor ({self.gate_floor}) must be at least 0, below 1.")
        if self.gate is GateKind.key_tied:
            if self.feature_map is not FeatureMap.sigmoid:
                raise ValueError(
                    f"linear.gate (key_tied) must come with linear.feature_map sigmoid, whose keys "
                    f"lie between 0 and 1: got {self.feature_map.value}. Set one of the two."
                )
            return
        for name in ("gate_offset", "gate_floor"):
            if getattr(self, name) != 0:
                raise ValueError(
                    f"linear.{name} ({getattr(self, name)}) has no effect with linear.gate "
                    "low_rank. Set linear.gate to key_tied, or leave it at 0."
                )


class BranchMerge(Enum):
    """How two normalised branches become one: their sum, their mean, or by learned weights."""

    sum = "sum"
    mean = "mean"
    learned = "learned"


class BranchProjections(Enum):
    """Whether both branches read the same q, k, v and end in one output projection."""

    shared = "shared"
    separate = "separate"


class BranchNorm(Enum):
    """Where a branch is normalised.

    `before_output`: each head's output (one weight of head_dim a branch, as the linear mixer's
    head norm). `after_output`: the projected branch, over all channels of a token, besides the
    linear mixer's head norm.
    """

    before_output = "before_output"
    after_output = "after_output"


@dataclass(frozen=True, kw_only=True, slots=True)
class BranchConfig:
    """Two mixers on one input, `X+Y` (SpikingBrain report, section 2.2, equation 6).

    The report leaves projections, the place of the norm and the weights open.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    merge: BranchMerge = BranchMerge.sum
    projections: BranchProjections = BranchProjections.shared
    norm: BranchNorm = BranchNorm.before_output


class SinkRope(Enum):
    """Where sink tokens stand for the softmax mixers' rotary positions.

    `none`: nowhere, scored against queries that are not rotated either. `absolute`: sink s at
    position s of every document, where tokens start at 0 too. `before`: in front of every document,
    sink s of S at position s - S.
    """

    none = "none"
    absolute = "absolute"
    before = "before"


class SinkInit(Enum):
    """What sink embeddings start as: copies of the BOS token's, or drawn."""

    bos = "bos"
    random = "random"


@dataclass(frozen=True, kw_only=True, slots=True)
class SinkConfig:
    """Learned embeddings that every token attends to (SpikingBrain report, section 2.2).

    They see each other and no token. With `through_linear` they also run through linear mixers, in
    order, and every document starts from the state that they leave there; without it linear mixers
    know nothing of them. `init` is used when they are new: `bos` copies the embedding of
    `bos_token_id` in a conversion.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    num_tokens: int = 0
    rope: SinkRope = SinkRope.before
    through_linear: bool = True
    init: SinkInit = SinkInit.random

    def __post_init__(self) -> None:
        if self.num_tokens < 0:
            raise ValueError(f"sinks.num_tokens ({self.num_tokens}) must be at least 0 (no sinks).")
