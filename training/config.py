"""The whole of a run as one typed tree; each node builds one object. Typed values only."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

from data.config import DataConfig
from models.config import ModelConfig, SpikingConfig
from parallel.config import (
    BackendName,
    EngineConfig,
    ParallelConfig,
    Precision,
    Recompute,
    RecomputeModule,
)

STRICT: dict[str, Any] = {"extra": "forbid"}


class OptimizerName(Enum):
    """Update rule."""

    adamw = "adamw"
    sgd = "sgd"


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """Update rule, clipping and parameter groups.

    `freeze` holds shell patterns over parameter names. `new_parameter_lr_factor` multiplies the
    learning rate of parameters that conversion added (gates, head norms).
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    name: OptimizerName = OptimizerName.adamw
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    new_parameter_lr_factor: float = 1.0
    freeze: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"optimizer.{name} ({getattr(self, name)}) must be from 0 to below 1."
                )
        if not self.eps > 0:
            raise ValueError(f"optimizer.eps ({self.eps}) must be above 0.")
        for name in ("weight_decay", "new_parameter_lr_factor"):
            _refuse_negative(f"optimizer.{name}", getattr(self, name))
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(
                f"optimizer.clip_norm ({self.clip_norm}) must be above 0. Use null for no clipping."
            )


class ScheduleKind(Enum):
    """Shape of the learning rate over a stage."""

    constant = "constant"
    cosine = "cosine"
    warmup_stable_decay = "warmup_stable_decay"


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """Learning rate over the steps of a stage: warm-up, then the shape, down to `min_lr_factor`.

    `decay_steps` null is all steps after warm-up (cosine) or the last fifth (warmup_stable_decay).
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    kind: ScheduleKind = ScheduleKind.cosine
    warmup_steps: int = 0
    decay_steps: int | None = None
    min_lr_factor: float = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """One stretch of the curriculum. `data` and `schedule` null are the run's."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    sequence_length: int
    steps: int
    global_batch_tokens: int
    lr: float
    schedule: ScheduleConfig | None = None
    data: DataConfig | None = None

    def __post_init__(self) -> None:
        for name in ("sequence_length", "steps", "global_batch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1.")
        _refuse_negative("lr", self.lr)
        rows, rest = divmod(self.global_batch_tokens, self.sequence_length)
        if rest:
            raise ValueError(
                f"global_batch_tokens ({self.global_batch_tokens}) must be a multiple of "
                f"sequence_length: got {self.sequence_length}. "
                f"Use {max(rows, 1) * self.sequence_length} or {(rows + 1) * self.sequence_length}."
            )

    @property
    def rows_per_step(self) -> int:
        """Rows of `sequence_length` tokens in one optimizer step, all ranks."""
        return self.global_batch_tokens // self.sequence_length


_MODULES = (RecomputeModule.norms, RecomputeModule.activations)
"""What selective recomputation names by default: much memory for little work."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """Precision, microbatches, recomputation and length.

    `max_steps` stops the run early without changing any schedule; above the stages' sum the last
    stage goes on at its final learning rate. `loss_chunk_tokens` bounds the memory of the loss.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    precision: Precision = Precision.fp32
    microbatch_rows: int = 1
    recompute: Recompute = Recompute.none
    recompute_every: int = 1
    recompute_modules: list[RecomputeModule] = field(default_factory=lambda: list(_MODULES))
    recompute_stages: list[int] | None = None
    teacher: str | None = None
    max_steps: int | None = None
    loss_chunk_tokens: int = 1024
    num_threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("microbatch_rows", "recompute_every", "loss_chunk_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name} ({getattr(self, name)}) must be at least 1.")
        for name in ("max_steps", "num_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"training.{name} ({value}) must be at least 1, or null.")
        if self.recompute_every > 1 and self.recompute is not Recompute.every_n:
            raise ValueError(
                f"training.recompute_every ({self.recompute_every}) must be 1 without "
                f"training.recompute=every_n: got {self.recompute.value}. Set one or the other."
            )
        if self.recompute is Recompute.selective and not self.recompute_modules:
            raise ValueError(
                "training.recompute_modules ([]) must name something for recompute=selective: "
                f"choose from {', '.join(member.value for member in RecomputeModule)}."
            )
        is_changed = set(self.recompute_modules) != set(_MODULES)
        if is_changed and self.recompute is not Recompute.selective:
            raise ValueError(
                f"training.recompute_modules ({[m.value for m in self.recompute_modules]}) must be "
                "left at its default without training.recompute=selective: got "
                f"{self.recompute.value}. Set one or the other."
            )
        if self.recompute_stages is not None and self.recompute is Recompute.none:
            raise ValueError(
                f"training.recompute_stages ({self.recompute_stages}) must be null without "
                "training.recompute: nothing is computed again. Set one or the other."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig:
    """What is learned from `training.teacher`, added to the cross entropy with these weights.

    `kl` weighs KL(teacher || student) of the next-token distributions at `temperature`, `hidden`
    the mean squared difference of the residual streams after each layer; both a target token.
    `offload` keeps the teacher's weights on the host between uses.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    kl: float = 0.0
    hidden: float = 0.0
    temperature: float = 1.0
    offload: bool = False

    def __post_init__(self) -> None:
        for name in ("kl", "hidden"):
            _refuse_negative(f"distill.{name}", getattr(self, name))
        if not self.temperature > 0:
            raise ValueError(f"distill.temperature ({self.temperature}) must be above 0.")


@dataclass(frozen=True, kw_only=True, slots=True)
class InitConfig:
    """Where weights come from: a checkpoint (weights only), or random from the run's seed.

    `new` and `unused` hold shell patterns over parameter names that only the model, or only the
    checkpoint, may have; any other such name is an error.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    checkpoint: str | None = None
    new: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When checkpoints are written and how many stay. The last step is always saved.

    The newest `keep_last` stay, and all whose step is a multiple of `keep_every_steps` (null: no
    others). `asynchronous` writes them in the background while training goes on.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    interval_steps: int = 100
    keep_last: int = 2
    keep_every_steps: int | None = None
    asynchronous: bool = True

    def __post_init__(self) -> None:
        _refuse_negative("checkpoint.interval_steps", self.interval_steps)
        if self.keep_last < 1:
            raise ValueError(f"checkpoint.keep_last ({self.keep_last}) must be at least 1.")
        if self.keep_every_steps is not None and self.keep_every_steps < 1:
            raise ValueError(
                f"checkpoint.keep_every_steps ({self.keep_every_steps}) must be at least 1, or "
                "null."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """Held-out perplexity in the loop; `interval_steps` 0 is never."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    interval_steps: int = 0
    rows: int = 16

    def __post_init__(self) -> None:
        _refuse_negative("evaluation.interval_steps", self.interval_steps)
        if self.rows < 1:
            raise ValueError(f"evaluation.rows ({self.rows}) must be at least 1.")


class WandbMode(Enum):
    """Where wandb writes."""

    disabled = "disabled"
    offline = "offline"
    online = "online"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggingConfig:
    """Metrics sinks besides `metrics.jsonl`, and how often a line is printed."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    wandb: WandbMode = WandbMode.offline
    project: str = "synfire"
    interval_steps: int = 10

    def __post_init__(self) -> None:
        if self.interval_steps < 1:
            raise ValueError(f"logging.interval_steps ({self.interval_steps}) must be at least 1.")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Everything `launch.train` needs; written resolved to `config.yaml` in the run folder."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    experiment: str
    run_dir: str
    model: ModelConfig
    stages: dict[str, StageConfig]
    seed: int = 1
    backend: BackendName = BackendName.auto
    spiking: SpikingConfig = field(default_factory=SpikingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    init: InitConfig = field(default_factory=InitConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("stages must have at least one entry. Add stages.main or a preset.")
        has_goal = self.distill.kl > 0 or self.distill.hidden > 0
        if has_goal != (self.training.teacher is not None):
            raise ValueError(
                f"training.teacher ({self.training.teacher or 'null'}) must come with distill.kl "
                f"or distill.hidden above 0: got {self.distill.kl:g} and {self.distill.hidden:g}. "
                "Set both the teacher and a weight, or neither."
            )

    @property
    def total_steps(self) -> int:
        """Steps the run makes: the stages' sum, or `training.max_steps`."""
        configured = sum(stage.steps for stage in self.stages.values())
        return configured if self.training.max_steps is None else self.training.max_steps


def _refuse_negative(key: str, value: float) -> None:
    # Written so that NaN is refused too.
    if not value >= 0:
        raise ValueError(f"{key} ({value}) must be at least 0.")
