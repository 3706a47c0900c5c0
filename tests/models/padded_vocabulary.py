"""A vocabulary of one rank whose weight has padding rows."""

from __future__ import annotations

import torch
from torch import Tensor


class PaddedVocabulary:
    """One rank holds all true rows, so that its reductions change nothing; counts them."""

    def __init__(self, num_rows: int) -> None:
        self.first_row, self.num_rows = 0, num_rows
        self.num_reductions = 0

    def sum(self, values: Tensor) -> Tensor:
        self.num_reductions += 1
        return values

    max = sum


def padded(weight: Tensor, rows: int) -> Tensor:
    """A leaf with `rows` more rows, all NaN as nobody fills them."""
    nan = torch.full((rows, weight.shape[1]), float("nan"), dtype=weight.dtype)
    return torch.cat([weight.detach(), nan]).requires_grad_()
