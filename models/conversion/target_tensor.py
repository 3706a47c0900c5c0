"""One tensor of a conversion's target: where it comes from and how to load it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor


class OriginKind(Enum):
    """Where a target tensor comes from."""

    copied = "copied"
    reshaped = "reshaped"
    scaled = "scaled"
    new = "new"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a target tensor comes from: source tensors by their own names, and how."""

    kind: OriginKind
    sources: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class Copies:
    """That a tensor is `count` equal parts side by side along `dim`."""

    count: int = 1
    dim: int = 0


@dataclass(frozen=True, slots=True)
class TargetTensor:
    """One tensor of the target; `load_part` gives `shape` and `dtype`, or one of its copies."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    origin: Origin
    load_part: Callable[[], Tensor] = field(repr=False)
    copies: Copies = Copies()

    def load(self) -> Tensor:
        """The whole tensor; copies along a dim of their own share memory."""
        part = self.load_part()
        if self.copies.count == 1:
            return part
        if part.shape[self.copies.dim] == 1:
            return part.expand(self.shape)
        return torch.cat([part] * self.copies.count, dim=self.copies.dim)
