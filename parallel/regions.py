"""The borders of a tensor-parallel region: what is communicated forward and backward.

Inside a region every rank holds all tokens and its own channels. Outside, the residual stream is
either whole on every rank, or with sequence parallelism cut along its tokens (dim 1 of `[B, T,
D]`). Each border is an autograd function whose backward is the other border's forward.

Not megatron-core's mappings: its all-reduce returns a gradient that is not contiguous unreduced,
without an error (0.16.1, measured; LOG.md), and its sequence-parallel ones need CUDA.

| border | forward | backward |
| --- | --- | --- |
| enter | nothing | all-reduce |
| leave | all-reduce | nothing |
| enter, sequence parallel | all-gather | reduce-scatter |
| leave, sequence parallel | reduce-scatter | all-gather |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor

TOKEN_DIM = 1

# Renamed after torch 2.11; the old names warn.
_gather = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor
_scatter = getattr(collectives, "reduce_scatter_single", None) or collectives.reduce_scatter_tensor


def all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks, as a new tensor."""
    return _ready(collectives.all_reduce(x.contiguous(), "sum", group))


def gather_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All ranks' tokens, in rank order."""
    return _ready(_gather(x.contiguous(), TOKEN_DIM, group))


def scatter_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's tokens of the sum over ranks."""
    return _ready(_scatter(x.contiguous(), "sum", TOKEN_DIM, group))


def _ready(x: Tensor) -> Tensor:
    """A plain tensor, once the collective that fills it is done."""
    done: Tensor = collectives.wait_tensor(x)  # type: ignore[no-untyped-call]
    return done


@dataclass(frozen=True, slots=True)
class TensorRegion:
    """The borders of regions cut over `group`."""

    group: dist.ProcessGroup
    sequence_parallel: bool

    def enter(self, x: Tensor) -> Tensor:
        """Residual stream to all tokens `[B, T, D]`; its gradient is summed over ranks."""
        function = _EnterTokens if self.sequence_parallel else _Enter
        out: Tensor = function.apply(x, self.group)  # type: ignore[no-untyped-call]
        return out

    def leave(self, x: Tensor) -> Tensor:
        """Partial sums `[B, T, D]` of the ranks to the residual stream."""
        function = _LeaveTokens if self.sequence_parallel else _Leave
        out: Tensor = function.apply(x, self.group)  # type: ignore[no-untyped-call]
        return out

    def channel_sum(self, x: Tensor) -> Tensor:
        """The sum over ranks, which every rank goes on to use: so is its gradient's."""
        out: Tensor = _Enter.apply(_Leave.apply(x, self.group), self.group)  # type: ignore[no-untyped-call]
        return out


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grads[0], ctx.group), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _EnterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return gather_tokens(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return scatter_tokens(grads[0], ctx.group), None


class _LeaveTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return scatter_tokens(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return gather_tokens(grads[0], ctx.group), None
