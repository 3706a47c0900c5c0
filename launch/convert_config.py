"""What `launch.convert` can be told. Typed values only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from models.config import ModelConfig
from models.conversion.new_parameters import ConversionOptions, KeyBias, NormInit
from models.strict import STRICT


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearConfig:
    """Layers that become `L`: what happens to their key bias."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    key_bias: KeyBias = KeyBias.keep


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

    The target is `model` (null: the source's own), with `mixers` and the window changed where they
    are set. `text` is a prepared folder or a text file; `text_tokens` tokens of it calibrate, and
    as many others judge. `gate_init` is `zero` or a half-life in tokens.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    source: str
    out: str
    model: ModelConfig | None = None
    mixers: str | None = None
    window_tokens: int | None = None
    window_includes_self: bool | None = None
    gate_init: float | str = "zero"
    norm_init: NormInit = NormInit.calibrated
    linear: LinearConfig = field(default_factory=LinearConfig)
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

    @property
    def options(self) -> ConversionOptions:
        """How new parameters start."""
        return ConversionOptions(
            gate_init=self.gate_init,
            norm_init=self.norm_init,
            key_bias=self.linear.key_bias,
            seed=self.seed,
        )
