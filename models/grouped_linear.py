"""Many products as one: rows sorted by expert, each expert's times its own matrix.

Torch's grouped matmul where it exists and takes device, dtype and sizes, otherwise a loop over
experts; rows of equal length are one batched product. Knows no routing and no ranks.

Shape letters: M rows, E experts, I features in, O features out.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

logger = logging.getLogger(__name__)

# Private in older releases.
_grouped_mm: Any = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
_ALIGNMENT_BYTES = 16
"""What torch's grouped matmul asks of a row."""


class Groups:
    """Which of the rows `[M, ...]`, sorted by expert, are whose.

    No dataclass: FSDP's mixed precision would copy it.

    Args:
        counts: rows of each expert, `[E]` int64 on the rows' device.
        length: the number of rows that all experts have; None where they differ.
        is_real: `[M]`, False for rows that only fill up to `length`; None where all are real.
        scale: `[M, 1]`, what spiked rows are whole multiples of; None where they are not spiked.
    """

    def __init__(
        self,
        counts: Tensor,
        *,
        length: int | None = None,
        is_real: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> None:
        self.counts, self.length, self.is_real = counts, length, is_real
        self.scale = scale
        self._sizes: list[int] | None = None

    def spiked(self, scale: Tensor) -> Groups:
        """The same groups of rows that are multiples of a scale."""
        return Groups(self.counts, length=self.length, is_real=self.is_real, scale=scale)

    @property
    def ends(self) -> Tensor:
        """The row after each expert's last, `[E]` int32."""
        return self.counts.cumsum(0, dtype=torch.int32)

    def slices(self) -> Iterator[tuple[int, slice]]:
        """Each expert with its rows, none for some; waits for the device once."""
        if self._sizes is None:
            self._sizes = self.counts.tolist()
        start = 0
        for expert, size in enumerate(self._sizes):
            yield expert, slice(start, start + size)
            start += size


class GroupedLinear(nn.Module):
    """One matrix an expert, `[E, O, I]`; computes in the dtype of its input.

    The weight holds NaN until initialised or loaded.
    """

    def __init__(self, num_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        shape = (num_experts, out_features, in_features)
        self.weight = nn.Parameter(torch.full(shape, float("nan")))

    def forward(self, x: Tensor, groups: Groups) -> Tensor:
        """Map sorted rows `[M, I]` to `[M, O]`."""
        return grouped_linear(x, self.weight.to(x.dtype), groups)


def grouped_linear(x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    """Sorted rows `[M, I]` times their expert's matrix of `[E, O, I]`: `[M, O]`.

    An expert without rows gets a gradient of zeros.
    """
    out: Tensor = _GroupedLinear.apply(x, weight, groups)  # type: ignore[no-untyped-call]
    return out


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.groups = groups
        return _rows_times_matrices(x, weight.transpose(1, 2), groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        d_x = d_weight = None
        if ctx.needs_input_grad[0]:
            d_x = _rows_times_matrices(grad, weight, ctx.groups)
        if ctx.needs_input_grad[1]:
            d_weight = _sums_of_outer_products(grad, x, ctx.groups)
        return d_x, d_weight, None


def _rows_times_matrices(x: Tensor, matrices: Tensor, groups: Groups) -> Tensor:
    """`[M, I]` and `[E, I, O]` to `[M, O]`."""
    if groups.length is not None:
        return torch.bmm(_by_expert(x, groups.length), matrices).flatten(0, 1)
    if _takes(x, matrices):
        product: Tensor = _grouped_mm(x, matrices, offs=groups.ends)
        return product
    out = x.new_empty(x.shape[0], matrices.shape[2])
    for expert, rows in groups.slices():
        torch.mm(x[rows], matrices[expert], out=out[rows])
    return out


def _sums_of_outer_products(left: Tensor, right: Tensor, groups: Groups) -> Tensor:
    """`[M, O]` and `[M, I]` to `[E, O, I]`, summed over each expert's rows."""
    if groups.length is not None:
        length = groups.length
        return torch.bmm(_by_expert(left, length).transpose(1, 2), _by_expert(right, length))
    if _takes(left, right):
        product: Tensor = _grouped_mm(left.t(), right, offs=groups.ends)
        # A sum of nothing may never be written.
        return product.masked_fill_((groups.counts == 0)[:, None, None], 0.0)
    out = left.new_empty(groups.counts.shape[0], left.shape[1], right.shape[1])
    for expert, rows in groups.slices():
        # No rows: zeros.
        torch.mm(left[rows].t(), right[rows], out=out[expert])
    return out


def _by_expert(x: Tensor, length: int) -> Tensor:
    """`[M, ...]` to `[E, length, ...]`."""
    return x.reshape(-1, length, x.shape[1])


def _takes(left: Tensor, right: Tensor) -> bool:
    """Whether torch's grouped matmul computes a product of these.

    On a CPU it is a loop too (torch 2.13), no faster and not in float64.
    """
    if left.device.type == "cpu" or left.numel() == 0 or right.numel() == 0:
        return False
    obstacle = _obstacle(left, right)
    if obstacle is not None:
        _warn_once(obstacle)
    return obstacle is None


def _obstacle(left: Tensor, right: Tensor) -> str | None:
    """Why torch's grouped matmul does not compute a product of these, None where it does."""
    if _grouped_mm is None:
        return f"torch {torch.__version__} has none"
    if left.dtype is not torch.bfloat16:
        return f"it takes torch.bfloat16, got {left.dtype}"
    for width in (left.shape[-1], *right.shape[1:]):
        if width * left.element_size() % _ALIGNMENT_BYTES:
            return f"it takes rows of whole {_ALIGNMENT_BYTES} bytes, got {width} channels"
    return None if _computes(left.device, left.dtype) else f"it does not compute on {left.device}"


@functools.cache
def _warn_once(obstacle: str) -> None:
    """Say that experts are slower than they could be; the same words only once."""
    logger.warning(
        "torch's grouped matmul is not used for experts (%s): a loop over them computes instead, "
        "and waits for the device.",
        obstacle,
    )


@functools.cache
def _computes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's grouped matmul gives right numbers here: releases take different things."""
    ones, matrices = (torch.ones(*s, device=device, dtype=dtype) for s in ((16, 16), (2, 16, 16)))
    ends = torch.tensor([4, 16], dtype=torch.int32, device=device)
    try:
        products = _grouped_mm(ones, matrices, offs=ends)
        sums = _grouped_mm(ones.t(), ones, offs=ends)
    except (RuntimeError, NotImplementedError):
        return False
    expected = torch.tensor([4.0, 12.0], device=device, dtype=dtype)[:, None, None]
    return bool((products == 16).all()) and bool((sums == expected).all())
