"""A loss that enters the gradient where it arises, and nobody adds up.

A pipeline stage in the middle never sees the model's loss; and the loss that is reported stays the
cross entropy. Knows nothing of what the losses are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def attach(value: Tensor, loss: Tensor, scale: float = 1.0) -> Tensor:
    """The value itself; its backward pass gives the gradient `scale` to `loss` (a scalar)."""
    out: Tensor = _Attach.apply(value, loss, scale)  # type: ignore[no-untyped-call]
    return out


def answer(value: Tensor, *others: Tensor) -> Tensor:
    """The value itself; its backward pass gives the others zeros, if nothing else does."""
    out: Tensor = value if not others else _Answer.apply(value, *others)  # type: ignore[no-untyped-call]
    return out


class _Answer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, *others: Tensor) -> Tensor:
        ctx.metas = [(x.shape, x.dtype, x.device) for x in others]
        return value.view_as(value) if value.dim() else value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        zeros = [torch.zeros(s, dtype=d, device=where) for s, d, where in ctx.metas]
        return grads[0], *zeros


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.dtype = scale, loss.dtype
        # FSDP warns of a root module that returns a view, as it does for the loss.
        return value.view_as(value) if value.dim() else value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grads
        return grad, torch.full((), ctx.scale, dtype=ctx.dtype, device=grad.device), None
