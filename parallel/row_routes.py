"""How rows travel to the ranks of their experts and back: all-to-all with uneven splits.

| step | forward | backward |
| --- | --- | --- |
| to experts | rows to the ranks of their experts | gradients home |
| from experts | outputs home | gradients to the ranks of the experts |

Both directions are autograd functions around collectives that keep no graph: each one's backward is
the other's forward. Every rank takes part in every exchange, whatever its rows: splits come from
counts that ranks have told each other, and so does whether spikes travel as integers. Which expert
is on which rank is `Route`'s alone: copies of an expert that many rows visit would be told here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor

from models.grouped_linear import Groups

MAX_INTEGER = 127
"""Largest spike count that travels in one byte."""


@dataclass(frozen=True, slots=True)
class Route:
    """The way of one microbatch's rows through one layer, seen from one rank of `group`.

    `sent` and `received` are rows to and from each rank. Rows arrive by sender; `order` puts them
    in the order of this rank's experts, `counts` of them each, and `back` undoes that.
    """

    group: dist.ProcessGroup
    sent: Sequence[int]
    received: Sequence[int]
    counts: Tensor
    order: Tensor
    back: Tensor

    def there(self, rows: Tensor) -> Tensor:
        """Rows `[M, ...]` sorted by expert to those `[M', ...]` of this rank's experts, sorted."""
        return exchange(rows, self.group, self.sent, self.received).index_select(0, self.order)

    def home(self, rows: Tensor) -> Tensor:
        """The reverse: one row for each that this rank sent, in that order."""
        rows = rows.index_select(0, self.back)
        return exchange(rows, self.group, self.received, self.sent)


@dataclass(frozen=True, slots=True)
class Integers:
    """Rows `[M, D]` as integers times a scale `[M, 1]`; `are_exact` says whether that is all."""

    values: Tensor
    scale: Tensor
    are_exact: Tensor

    @classmethod
    def of(cls, rows: Tensor, scale: Tensor) -> Integers:
        """Look for whole multiples of each row's scale that fit in a byte."""
        counts = torch.div(rows, scale).round_()
        fit = (counts.abs() <= MAX_INTEGER) & ((counts * scale).to(rows.dtype) == rows)
        return cls(counts.to(torch.int8), scale, fit.all())

    def packed(self) -> Tensor:
        """Integers and scales in one message, `[M, D + bytes of a scale]`."""
        # Flat, because a column of nothing has no stride.
        scale = self.scale.flatten().view(torch.int8)
        return torch.cat([self.values, scale.view(-1, self.scale.itemsize)], dim=1)

    def unpacked(self, message: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows of another rank's message: the bits that travelling plainly would have given."""
        width = self.values.shape[1]
        scale = message[:, width:].contiguous().view(self.scale.dtype)
        return message[:, :width].to(scale.dtype).mul_(scale).to(dtype)


def find_route(
    groups: Groups, group: dist.ProcessGroup, integers: Integers | None = None
) -> tuple[Route, bool]:
    """Find out how many rows come to this rank's experts. Collective.

    Rows of equal length need no asking: every rank has as many of each expert. Otherwise ranks tell
    each other their counts, and the device is waited for once.

    Args:
        groups: this rank's rows for each expert of all ranks; a rank has E / ep in a row.
        group: the ranks that experts are cut over.
        integers: this rank's rows as integers; all ranks or none have them.

    Returns:
        The route, and whether every rank's rows are exact as integers.
    """
    num_ranks = group.size()
    own = groups.counts.view(num_ranks, -1)
    if groups.length is not None:
        each = [groups.length * own.shape[1]] * num_ranks
        is_exact = integers is not None and bool(_of_all(integers.are_exact, group).all())
        return _route(group, own, (each, each)), is_exact
    flag = own.new_zeros(()) if integers is None else integers.are_exact.to(own.dtype)
    told = exchange(torch.cat([own, flag.expand(num_ranks, 1)], dim=1), group)
    arriving, flags = told[:, :-1], told[:, -1]
    numbers = torch.stack([own.sum(dim=1), arriving.sum(dim=1), flags])
    sent, received, exact = numbers.tolist()
    return _route(group, arriving, (sent, received)), all(exact)


def to_experts(rows: Tensor, route: Route, integers: Integers | None = None) -> Tensor:
    """Rows `[M, D]` sorted by expert to the rows `[M', D]` of this rank's experts, sorted.

    With `integers` those travel instead, and become the same rows again.
    """
    out: Tensor = _ToExperts.apply(rows, route, integers)  # type: ignore[no-untyped-call]
    return out


def from_experts(rows: Tensor, route: Route) -> Tensor:
    """What this rank's experts made of their rows `[M', D]`, back where those are from `[M, D]`."""
    out: Tensor = _FromExperts.apply(rows, route)  # type: ignore[no-untyped-call]
    return out


def exchange(
    rows: Tensor,
    group: dist.ProcessGroup,
    sent: Sequence[int] | None = None,
    received: Sequence[int] | None = None,
) -> Tensor:
    """All-to-all of `sent` rows to each rank, which come from each rank in `received`.

    Without numbers every rank gets as many.
    """
    out = collectives.all_to_all_single(
        rows.contiguous(),
        None if received is None else list(received),
        None if sent is None else list(sent),
        group,
    )
    done: Tensor = collectives.wait_tensor(out)  # type: ignore[no-untyped-call]
    return done


def _of_all(flag: Tensor, group: dist.ProcessGroup) -> Tensor:
    """A flag of every rank."""
    return exchange(flag.to(torch.int8).expand(group.size()), group)


def _route(
    group: dist.ProcessGroup, arriving: Tensor, rows: tuple[Sequence[int], Sequence[int]]
) -> Route:
    """The route of rows that arrive by sender, `[ranks, E / ep]` of them."""
    sent, received = rows
    count = sum(received)
    places = torch.arange(count, device=arriving.device)
    sizes = arriving.t().flatten()
    before = (arriving.flatten().cumsum(0) - arriving.flatten()).view_as(arriving).t().flatten()
    shift = before - (sizes.cumsum(0) - sizes)
    order = places + torch.repeat_interleave(shift, sizes, output_size=count)
    back = torch.empty_like(order).scatter_(0, order, places)
    return Route(group, sent, received, arriving.sum(dim=0), order, back)


class _ToExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, route: Route, integers: Integers | None) -> Tensor:
        ctx.route = route
        if integers is None:
            return route.there(rows)
        return integers.unpacked(route.there(integers.packed()), rows.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.route.home(grads[0]), None, None


class _FromExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, route: Route) -> Tensor:
        ctx.route = route
        return route.home(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.route.there(grads[0]), None
