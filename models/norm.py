"""Root-mean-square normalisation in few passes, forward and backward. Knows no model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _RmsNorm(torch.autograd.Function):
    """`x / rms(x) * weight`; the backward keeps x and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        wide = x.to(dtype)
        norm: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse_rms = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse_rms)
        return (wide * inverse_rms).mul_(weight.to(dtype)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse_rms = ctx.saved_tensors
        dtype = inverse_rms.dtype
        dim = x.shape[-1]
        grad, wide, scale = grads[0].to(dtype), x.to(dtype), weight.to(dtype)
        product = (grad * wide).reshape(-1, dim)
        d_weight = torch.mv(product.t(), inverse_rms.reshape(-1))
        projection = torch.mv(product, scale).view_as(inverse_rms)
        correction = projection.mul_(inverse_rms.pow(3)).div_(-dim)
        d_x = torch.mul(grad, inverse_rms).mul_(scale).addcmul_(wide, correction)
        return d_x.to(x.dtype), d_weight.to(weight.dtype), None


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dim with a learned weight `[dim]`.

    Computes in at least float32 and never below the input's precision; returns the input's dtype,
    whatever the weight's. The weight holds NaN until initialised or loaded.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.full((dim,), float("nan")))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[..., dim]`."""
        out: Tensor = _RmsNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return out
