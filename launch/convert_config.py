"""What `launch.convert` can be told. Typed values only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from models.config import ModelConfig
from models.conversion.new_parameters import ConversionOptions, KeyBias, NormInit, UpcycleMode
from models.strict import STRICT


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearConfig:
    """Layers that become `L`, alone or as a branch: what happens to their key bias."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    key_bias: KeyBias = KeyBias.keep


@dataclass(frozen=True, kw_only=True, slots=True)
class UpcycleConfig:
    """Layers that become `e`: how copies of the FFN are scaled, how random routers are drawn.

    `router_std` null is the model's `initializer_range`.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    mode: UpcycleMode = UpcycleMode.exact
    router_std: float | None = None

    def __post_init__(self) -> None:
        if self.router_std is None:
            return
        if self.router_std <= 0:
            raise ValueError(
                f"upcycle.router_std ({self.router_std}) must be above 0, or null for the model's "
                "initializer_range. Routers at zero are upcycle.mode=exact."
            )
        if self.mode is UpcycleMode.exact:
            raise ValueError(
                f"upcycle.router_std ({self.router_std}) has no effect with upcycle.mode exact, "
                "whose routers start at zero. Set upcycle.mode to measured or paper."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class AlignConfig:
    """Alignment of new parameters to the source's attention on `tokens` tokens (0: none)."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    tokens: int = 0
    learning_rate: float = 3e-2
    rows_per_step: int = 4
    epochs: int = 1

    def __post_init__(self) -> None:
        for name in ("tokens", "rows_per_step", "epochs"):
            least = 0 if name == "tokens" else 1
            if getattr(self, name) < least:
                raise ValueError(f"align.{name} ({getattr(self, name)}) must be at least {least}.")
        if self.learning_rate <= 0:
            raise ValueError(f"align.learning_rate ({self.learning_rate}) must be above 0.")


@dataclass(frozen=True, kw_only=True, slots=True)
class CertificateConfig:
    """Whether the certificate's numeric part (both models on sample text) is computed."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    numeric: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertConfig:
    """A conversion.

    The target is `model` (null: the source's own), with `mixers`, `ffns` and the window changed
    where they are set. `text` is a prepared folder or a text file; `text_tokens` tokens of it
    calibrate, and as many others judge. `gate_init` is `zero` or a half-life in tokens.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    source: str
    out: str
    model: ModelConfig | None = None
    mixers: str | None = None
    ffns: str | None = None
    window_tokens: int | None = None
    window_includes_self: bool | None = None
    gate_init: float | str = "zero"
    norm_init: NormInit = NormInit.calibrated
    linear: LinearConfig = field(default_factory=LinearConfig)
    upcycle: UpcycleConfig = field(default_factory=UpcycleConfig)
    text: str | None = None
    text_tokens: int = 8192
    sequence_length: int = 512
    align: AlignConfig = field(default_factory=AlignConfig)
    certificate: CertificateConfig = field(default_factory=CertificateConfig)
    seed: int = 1

    def __post_init__(self) -> None:
        for name in ("text_tokens", "sequence_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1.")
        if self.text is None and self.align.tokens:
            raise ValueError(
                f"align.tokens ({self.align.tokens}) must be 0 without sample text. Set text=DIR."
            )
        if self.text is None and self.linear.key_bias is KeyBias.centre:
            raise ValueError("linear.key_bias (centre) must have sample text. Set text=DIR.")
        if self.text is None and self.upcycle.mode is UpcycleMode.measured:
            raise ValueError("upcycle.mode (measured) must have sample text. Set text=DIR.")

    @property
    def options(self) -> ConversionOptions:
        """How new parameters start."""
        return ConversionOptions(
            gate_init=self.gate_init,
            norm_init=self.norm_init,
            key_bias=self.linear.key_bias,
            upcycle=self.upcycle.mode,
            router_std=self.upcycle.router_std,
            seed=self.seed,
        )
