"""From tokens to rows sorted by expert, and back: who goes where, and who is dropped.

Both ways only gather, forward and backward, so sums come out in one order on any device. With a
capacity each expert takes the same number of rows from each packed row of tokens, first come by
position, so that nothing depends on which rows share a microbatch; what is missing is filled up
with copies that nobody reads.

Shape letters: B packed rows, T tokens, K choices of a token, N = B T tokens, M rows of experts,
E experts, D hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.expert_config import ExpertConfig
from models.grouped_linear import Groups


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Who goes where.

    Args:
        counts: choices of each expert in each packed row, `[B, E]`, dropped ones included.
        groups: the experts' rows.
        source: the choice (of N K) that each expert's row comes from, `[M]`.
        place: the row that each choice went to, `[N, K]`; 0 where it is dropped.
        is_kept: `[N, K]`; None where all are.
    """

    counts: Tensor
    groups: Groups
    source: Tensor
    place: Tensor
    is_kept: Tensor | None

    @property
    def num_dropped(self) -> Tensor:
        """Choices that found their expert full."""
        if self.is_kept is None:
            return torch.zeros((), dtype=torch.int64, device=self.place.device)
        return (~self.is_kept).sum()

    def rows(self, x: Tensor) -> Tensor:
        """Tokens `[B, T, D]` to the experts' rows `[M, D]`."""
        out: Tensor = _ToRows.apply(x, self)  # type: ignore[no-untyped-call]
        return out

    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Weighted sums `[B, T, D]` over each token's rows of `[M, D]`.

        Args:
            rows: what the experts made of them.
            weights: `[B, T, K]`, at least float32; sums are, too.
        """
        if self.is_kept is not None:
            weights = weights * self.is_kept.view_as(weights)
        out: Tensor = _FromRows.apply(rows, weights, self)  # type: ignore[no-untyped-call]
        return out


def dispatch(experts: Tensor, num_experts: int, *, capacity_factor: float | None) -> Dispatch:
    """Plan for chosen experts `[B, T, K]`; without a capacity factor nobody is dropped."""
    num_rows, num_tokens, top_k = experts.shape
    flat = experts.flatten(1)
    counts = flat.new_zeros(num_rows, num_experts).scatter_add_(1, flat, torch.ones_like(flat))
    row = torch.arange(num_rows, device=experts.device)[:, None]
    group = (flat * num_rows + row).flatten()
    source = group.argsort(stable=True)
    place = torch.empty_like(source)
    place[source] = torch.arange(source.shape[0], device=source.device)
    if capacity_factor is None:
        groups = Groups(counts.sum(dim=0))
        return Dispatch(counts, groups, source, place.view(-1, top_k), None)
    size = capacity(capacity_factor, top_k=top_k, num_tokens=num_tokens, num_experts=num_experts)
    of_group = counts.t().flatten()
    first = of_group.cumsum(0) - of_group
    turn = place - first[group]
    is_kept = turn < size
    place = torch.where(is_kept, group * size + turn, 0)
    slot = torch.arange(size, device=experts.device)
    is_real = (slot < of_group[:, None]).flatten()
    index = (first[:, None] + slot).flatten().clamp(max=source.shape[0] - 1)
    length = num_rows * size
    groups = Groups(counts.new_full((num_experts,), length), length=length, is_real=is_real)
    shape = (-1, top_k)
    return Dispatch(counts, groups, source[index], place.view(shape), is_kept.view(shape))


def capacity(factor: float, *, top_k: int, num_tokens: int, num_experts: int) -> int:
    """Rows that an expert takes of one packed row: `ceil(factor k T / E)`, at most T."""
    # The factor as it is written: 1.1 is above 11 / 10 as a float.
    share = Fraction(str(factor)) * top_k * num_tokens / num_experts
    return min(math.ceil(share), num_tokens)


def num_expert_rows(moe: ExpertConfig, num_rows: int, num_tokens: int) -> int:
    """M of so many packed rows of tokens, rows that only fill up included."""
    if moe.capacity_factor is None:
        return num_rows * num_tokens * moe.top_k
    each = capacity(
        moe.capacity_factor,
        top_k=moe.top_k,
        num_tokens=num_tokens,
        num_experts=moe.num_experts,
    )
    return num_rows * moe.num_experts * each


class _ToRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Dispatch) -> Tensor:
        ctx.plan, ctx.shape = plan, x.shape
        return x.flatten(0, 1).index_select(0, plan.source // plan.place.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        picked = _of_choices(grads[0], ctx.plan)
        if ctx.plan.is_kept is not None:
            picked = picked * ctx.plan.is_kept[..., None]
        return picked.sum(dim=1).view(ctx.shape), None


class _FromRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, plan: Dispatch) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(rows, weights)
        total = (_of_choices(rows, plan) * weights.flatten(0, 1)[..., None]).sum(dim=1)
        return total.to(rows.dtype).view(*weights.shape[:2], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weights = ctx.saved_tensors
        plan: Dispatch = ctx.plan
        grad = grads[0].flatten(0, 1)
        d_weights = (_of_choices(rows, plan) * grad[:, None].to(weights.dtype)).sum(dim=-1)
        weight = weights.flatten()[plan.source]
        if plan.groups.is_real is not None:
            weight = weight * plan.groups.is_real
        d_rows = grad.index_select(0, plan.source // plan.place.shape[1]) * weight[:, None]
        return d_rows.to(rows.dtype), d_weights.view_as(weights), None


def _of_choices(rows: Tensor, plan: Dispatch) -> Tensor:
    """Each choice's row of `[M, D]`, `[N, K, D]`; any row where it was dropped."""
    return rows.index_select(0, plan.place.flatten()).view(*plan.place.shape, -1)
