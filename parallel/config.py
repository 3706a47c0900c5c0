"""How a run is laid out over ranks, and on which device. Typed values only."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

STRICT: dict[str, Any] = {"extra": "forbid"}


class Shard(Enum):
    """What data-parallel ranks share out: nothing, gradients and moments, or parameters too."""

    none = "none"
    gradients = "gradients"
    parameters = "parameters"


class PipelineSchedule(Enum):
    """Order of microbatches through pipeline stages."""

    gpipe = "gpipe"
    one_f_one_b = "one_f_one_b"
    interleaved = "interleaved"
    zero_bubble = "zero_bubble"


class EngineName(Enum):
    """Which engine runs forward, backward and the optimizer."""

    torch = "torch"
    deepspeed = "deepspeed"


class BackendName(Enum):
    """Device back end; `auto` detects."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    maca = "maca"


class Precision(Enum):
    """Compute dtype. Master weights, reduction and moments are float32 (float64 for fp64)."""

    fp64 = "fp64"
    fp32 = "fp32"
    bf16 = "bf16"


class Recompute(Enum):
    """Which activations are computed again in the backward pass."""

    none = "none"
    selective = "selective"
    full = "full"
    every_n = "every_n"


_NOT_YET = "is not in this release. Leave it at {default}."


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """Sizes of the mesh axes pp, dp, cp, tp (tp innermost); `dp` null is the world size."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    pp: int = 1
    dp: int | None = None
    cp: int = 1
    tp: int = 1
    ep: int = 1
    dp_replicate: int = 1
    sequence_parallel: bool = False
    schedule: PipelineSchedule = PipelineSchedule.one_f_one_b
    virtual_stages: int = 1
    shard: Shard = Shard.gradients

    def __post_init__(self) -> None:
        for name in ("pp", "cp", "tp", "ep", "dp_replicate", "virtual_stages"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"parallel.{name} ({value}) must be at least 1.")
            if value > 1:
                raise ValueError(
                    f"parallel.{name} ({value}) must be 1: this axis {_NOT_YET.format(default=1)} "
                    "Use parallel.dp for more ranks."
                )
        if self.dp is not None and self.dp < 1:
            raise ValueError(f"parallel.dp ({self.dp}) must be at least 1, or null to derive it.")
        if self.schedule is not PipelineSchedule.one_f_one_b:
            raise ValueError(
                f"parallel.schedule ({self.schedule.value}) must be one_f_one_b: another order of "
                "pipeline stages " + _NOT_YET.format(default="one_f_one_b")
            )
        if self.sequence_parallel:
            raise ValueError(
                "parallel.sequence_parallel (true) must be false: it needs parallel.tp, which "
                + _NOT_YET.format(default="false")
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Which engine; `zero` is the ZeRO stage of the deepspeed engine."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    name: EngineName = EngineName.torch
    zero: int | None = None

    def __post_init__(self) -> None:
        if self.name is EngineName.deepspeed:
            raise ValueError(
                f"engine ({self.name.value}) {_NOT_YET.format(default='torch')} "
                "Use engine=torch with parallel.shard=gradients or parameters."
            )
        if self.zero is not None:
            raise ValueError(
                f"engine.zero ({self.zero}) must be null for engine=torch. "
                "Use parallel.shard=none|gradients|parameters."
            )
