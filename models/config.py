"""What a model is: shapes, layer pattern, positions, spiking. Typed values; no tensors, no I/O."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

from models.expert_config import ExpertConfig
from models.layer_pattern import FfnKind, LayerPattern, MixerKind, Mixers
from models.mixer_config import (
    BranchConfig,
    LinearAttentionConfig,
    RopeConfig,
    SinkConfig,
    SinkInit,
)
from models.strict import STRICT


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """One decoder-only language model; `mixers` and `ffns` are patterns, one symbol a layer."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    mixers: str
    ffns: str
    qkv_bias: bool = False
    output_bias: bool = False
    ffn_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    max_position_embeddings: int = 131_072
    window_tokens: int | None = None
    window_includes_self: bool = True
    rope: RopeConfig = field(default_factory=RopeConfig)
    linear: LinearAttentionConfig = field(default_factory=LinearAttentionConfig)
    branches: BranchConfig = field(default_factory=BranchConfig)
    sinks: SinkConfig = field(default_factory=SinkConfig)
    moe: ExpertConfig = field(default_factory=ExpertConfig)
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads",
            "num_key_value_heads", "head_dim",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1.")
        if not self.rms_norm_eps > 0:
            raise ValueError(f"rms_norm_eps ({self.rms_norm_eps}) must be above 0.")
        if not self.initializer_range >= 0:
            raise ValueError(f"initializer_range ({self.initializer_range}) must be at least 0.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads: got {self.num_key_value_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: rotary pairs channels.")
        self._check_layers()

    def _check_layers(self) -> None:
        """Refuse patterns that disagree with each other or lack what their layers need."""
        mixers = LayerPattern.parse_mixers(self.mixers)
        ffns = LayerPattern.parse_ffns(self.ffns)
        if len(mixers) != len(ffns):
            raise ValueError(
                f"ffns ({self.ffns}: {len(ffns)} layers) must have as many layers as mixers "
                f"({self.mixers}): got {len(mixers)}. Change one of the two patterns."
            )
        uses_window = any(MixerKind.sliding_window in layer for layer in mixers)
        if uses_window and (self.window_tokens is None or self.window_tokens < 1):
            raise ValueError(
                f"window_tokens ({self.window_tokens}) must be at least 1 because mixers "
                f"({self.mixers}) has S layers. Set model.window_tokens."
            )
        if self.uses_sinks and self.sinks.init is SinkInit.bos and self.bos_token_id is None:
            raise ValueError(
                "sinks.init (bos) must come with bos_token_id, whose embedding sinks start from: "
                "got null. Set model.bos_token_id, or sinks.init=random."
            )
        reads_sinks = {MixerKind.full, MixerKind.sliding_window}
        if self.sinks.through_linear:
            reads_sinks.add(MixerKind.linear)
        if self.uses_sinks and not any(reads_sinks & set(layer) for layer in mixers):
            raise ValueError(
                f"sinks.num_tokens ({self.sinks.num_tokens}) has no effect: no layer of mixers "
                f"({self.mixers}) sees them. Set it to 0, or sinks.through_linear=true with L."
            )
        if self.ffn_bias and FfnKind.mixture_of_experts in ffns:
            raise ValueError(
                f"ffn_bias (true) must be false with mixture-of-experts layers: got ffns "
                f"({self.ffns}). Set ffn_bias=false, or use d layers only."
            )

    @property
    def layers(self) -> LayerPattern:
        """The parsed pattern."""
        return LayerPattern(
            mixers=LayerPattern.parse_mixers(self.mixers), ffns=LayerPattern.parse_ffns(self.ffns)
        )

    @property
    def num_hidden_layers(self) -> int:
        """Number of blocks."""
        return len(self.layers.mixers)

    @property
    def visible_window_tokens(self) -> int | None:
        """Keys an `S` query sees, itself included.

        With `window_includes_self` (default, report Eq. 2) that is `window_tokens`; without it one
        more, which is the 4097-key convention of the public inference code.
        """
        if self.window_tokens is None:
            return None
        return self.window_tokens + (0 if self.window_includes_self else 1)

    @property
    def expert_intermediate_size(self) -> int:
        """Inner channels of one expert."""
        return self.moe.intermediate_size or self.intermediate_size

    @property
    def uses_sinks(self) -> bool:
        """Whether tokens attend to learned ones."""
        return self.sinks.num_tokens > 0

    @property
    def sink_mixers(self) -> tuple[Mixers, ...]:
        """The mixers of each layer that sinks run through, and whose tokens see them."""
        passed_by = () if self.sinks.through_linear else (MixerKind.linear,)
        return tuple(
            tuple(kind for kind in each if self.uses_sinks and kind not in passed_by)
            for each in self.layers.mixers
        )

    @property
    def is_plain_transformer(self) -> bool:
        """Whether every layer is full or windowed softmax attention with a dense FFN, no sinks."""
        return not self.uses_sinks and all(
            mixer in ((MixerKind.full,), (MixerKind.sliding_window,)) and ffn is FfnKind.dense
            for mixer, ffn in zip(self.layers.mixers, self.layers.ffns, strict=True)
        )


class NeuronKind(Enum):
    """Which spiking neuron sits at the inputs of projections."""

    off = "off"
    adaptive = "adaptive"


class ThresholdGrad(Enum):
    """Whether the adaptive threshold is a constant in the backward pass."""

    detached = "detached"
    through = "through"


@dataclass(frozen=True, kw_only=True, slots=True)
class SpikingConfig:
    """Adaptive-threshold spiking and its schedule over optimizer steps.

    Before `start_step` activations are continuous. From there k moves linearly from `k_start`
    (`k` when null) to `k` over `anneal_steps`, and the spiked value is blended in over
    `blend_steps`. `max_count` clips counts (null: no clip, as in the report).
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    neuron: NeuronKind = NeuronKind.off
    k: float = 3.0
    k_start: float | None = None
    start_step: int = 0
    anneal_steps: int = 0
    blend_steps: int = 0
    max_count: int | None = None
    threshold_grad: ThresholdGrad = ThresholdGrad.detached
    statistics_interval_steps: int = 10
    statistics_tokens: int = 256

    def __post_init__(self) -> None:
        for name in ("k", "k_start"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} ({value}) must be above 0: the threshold is mean|x| / k.")
        for name in ("start_step", "anneal_steps", "blend_steps", "statistics_interval_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 0.")
        if self.statistics_tokens < 1:
            raise ValueError(f"statistics_tokens ({self.statistics_tokens}) must be at least 1.")
        if self.k_start is not None and self.anneal_steps == 0:
            raise ValueError(
                f"k_start ({self.k_start}) must come with anneal_steps, over which k moves from it "
                "to k. Set spiking.anneal_steps, or leave k_start at null."
            )
        if self.max_count is not None and self.max_count < 1:
            raise ValueError(
                f"max_count ({self.max_count}) must be at least 1, or null for no clip."
            )
