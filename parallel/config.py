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


class RecomputeModule(Enum):
    """What selective recomputation computes again in the backward pass.

    Kinds of mixers stand for the layers that have one, whose branches run again together.
    """

    norms = "norms"
    activations = "activations"
    full = "full"
    sliding_window = "sliding_window"
    linear = "linear"
    experts = "experts"
    expert_layers = "expert_layers"


_AXES = ("pp", "cp", "tp", "ep")
_DERIVED = frozenset({"dp", "dp_shard", "virtual_stages"})
_NOT_YET = "is not in this release. Leave it at {default}."


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """Sizes of the mesh axes pp, dp, cp, tp (tp innermost) and what is done along them.

    `dp` null is what the other axes leave of the processes; it is `dp_replicate x dp_shard`, and
    parameters are sharded over `dp_shard` only. `ep` data-parallel ranks share out the experts; it
    is no factor of the number of ranks. `virtual_stages` (stages a rank) null is 2 for
    `interleaved` and 1 otherwise. `stage_layers` cuts the model by hand: layers of each stage, in
    order. `vocab_multiple`: where tp cuts the vocabulary, its rows are padded to a multiple of it.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    pp: int = 1
    dp: int | None = None
    cp: int = 1
    tp: int = 1
    ep: int = 1
    dp_replicate: int = 1
    dp_shard: int | None = None
    sequence_parallel: bool = False
    schedule: PipelineSchedule = PipelineSchedule.one_f_one_b
    virtual_stages: int | None = None
    stage_layers: list[int] | None = None
    shard: Shard = Shard.gradients
    vocab_multiple: int = 128

    def __post_init__(self) -> None:
        for name in (*_AXES, "dp", "dp_shard", "dp_replicate", "virtual_stages", "vocab_multiple"):
            value = getattr(self, name)
            if value is not None and value < 1:
                null = ", or null to derive it" if name in _DERIVED else ""
                raise ValueError(f"parallel.{name} ({value}) must be at least 1{null}.")
        if self.cp > 1:
            raise ValueError(
                f"parallel.cp ({self.cp}) must be 1: this axis {_NOT_YET.format(default=1)} "
                "Use dp, tp or pp for more ranks."
            )
        if self.sequence_parallel and self.tp == 1:
            raise ValueError(
                "parallel.sequence_parallel (true) must come with parallel.tp above 1: got tp 1. "
                "Set parallel.tp, or parallel.sequence_parallel=false."
            )
        self._check_data_axes()
        self._check_stages()

    @property
    def num_stages(self) -> int:
        """Pieces that the model is cut into, over all pipeline ranks."""
        return self.pp * self.stages_per_rank

    @property
    def stages_per_rank(self) -> int:
        """Pieces of the model on each pipeline rank."""
        if self.virtual_stages is not None:
            return self.virtual_stages
        return 2 if self.schedule is PipelineSchedule.interleaved and self.pp > 1 else 1

    def _check_data_axes(self) -> None:
        replicas, shards = self.dp_replicate, self.dp_shard
        if self.shard is Shard.none and (replicas > 1 or (shards or 1) > 1):
            raise ValueError(
                "parallel.shard (none) must leave dp_replicate at 1 and dp_shard null, because it "
                f"replicates over all dp ranks: got {replicas} and "
                f"{'null' if shards is None else shards}. Leave them, or set parallel.shard to "
                "gradients or parameters."
            )
        if self.dp is None:
            return
        if shards and self.dp != replicas * shards:
            raise ValueError(
                f"parallel.dp ({self.dp}) must equal dp_replicate x dp_shard: got {replicas} x "
                f"{shards}. Set it to {replicas * shards}, or leave dp or dp_shard null to derive "
                "it."
            )
        if self.dp % replicas:
            below = self.dp // replicas * replicas
            valid = " or ".join(str(dp) for dp in (below, below + replicas) if dp)
            raise ValueError(
                f"parallel.dp ({self.dp}) must be a multiple of parallel.dp_replicate: got "
                f"{replicas}. Set it to {valid}, or change parallel.dp_replicate."
            )

    def _check_stages(self) -> None:
        takes_several = self.schedule in (
            PipelineSchedule.interleaved, PipelineSchedule.zero_bubble,
        )  # fmt: skip
        if self.stages_per_rank > 1 and (self.pp == 1 or not takes_several):
            raise ValueError(
                f"parallel.virtual_stages ({self.virtual_stages}) must be 1 for parallel.pp "
                f"{self.pp} with schedule {self.schedule.value}. Use pp above 1 with schedule "
                "interleaved or zero_bubble, or leave it null."
            )
        if self.schedule is PipelineSchedule.interleaved and self.virtual_stages == 1:
            raise ValueError(
                "parallel.virtual_stages (1) must be at least 2 for schedule interleaved. Set it "
                "to 2 or null, or use schedule one_f_one_b."
            )
        if self.stage_layers is None:
            return
        if len(self.stage_layers) != self.num_stages:
            raise ValueError(
                f"parallel.stage_layers ({self.stage_layers}) must give one number of layers for "
                f"each stage: got {len(self.stage_layers)} numbers for pp {self.pp} x "
                f"{self.stages_per_rank} stages. Correct the list, or leave it null."
            )
        for stage, num_layers in enumerate(self.stage_layers):
            if num_layers < 0:
                raise ValueError(
                    f"parallel.stage_layers ({self.stage_layers}) must give 0 layers or more to "
                    f"each stage: got {num_layers} for stage {stage}. Correct the list, or leave "
                    "it null."
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
