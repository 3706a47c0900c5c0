"""Which text a run reads and how it is prepared. Typed values only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

STRICT: dict[str, Any] = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusConfig:
    """What is prepared on first use when no prepared folder is named.

    `source` null is the Python standard library's own source files; `max_bytes` null takes all.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    source: str | None = None
    out: str = "outputs/data/stdlib"
    max_bytes: int | None = None
    vocab_size: int = 2048
    heldout_fraction: float = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Prepared data of a run or of one stage.

    `path` names one prepared folder; `mixture` maps prepared folders to weights instead. With
    neither, `corpus` is prepared on first use. `prefetch_steps` batches are built ahead in a
    thread.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    path: str | None = None
    mixture: dict[str, float] = field(default_factory=dict)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    prefetch_steps: int = 2

    def __post_init__(self) -> None:
        if self.path is not None and self.mixture:
            raise ValueError("data.path and data.mixture must not both be set. Remove one.")
        if self.prefetch_steps < 0:
            raise ValueError(f"data.prefetch_steps ({self.prefetch_steps}) must be at least 0.")
        for path, weight in self.mixture.items():
            if not weight > 0:
                raise ValueError(f"data.mixture.{path} ({weight}) must be above 0.")
