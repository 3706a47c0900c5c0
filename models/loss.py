"""Next-token loss in token chunks: logits exist for one chunk at a time, forward and backward.

The backward computes each chunk's logits again, so peak memory does not grow with the number of
tokens. Nothing here changes its inputs. Shape letters: M tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

MASKED = -100
"""Label of a token that predicts nothing."""


def logits_of(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits `[..., V]` of `hidden` `[..., D]`, multiplied in hidden's dtype, at least float32."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return F.linear(hidden, weight.to(hidden.dtype)).to(dtype)


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk_tokens: int
) -> Tensor:
    """Summed cross entropy of `labels` `[M]` under `hidden` `[M, D]` and head `weight` `[V, D]`.

    Labels of -100 count nothing. Weight gradients accumulate over chunks in at least float32.

    Returns:
        A scalar in at least float32: the sum, not the mean (callers know the global count).
    """
    loss: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, labels, chunk_tokens
    )
    return loss


@torch.no_grad()
def chunked_token_losses(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk_tokens: int
) -> Tensor:
    """Cross entropy of each token `[M]`, 0 where masked, without gradients; arguments as above."""
    return _forward(hidden, weight, labels, chunk_tokens)[0]


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
        losses, log_normalisers = _forward(hidden, weight, labels, chunk)
        ctx.save_for_backward(hidden, weight, labels, log_normalisers)
        ctx.chunk = chunk
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, labels, log_normalisers = ctx.saved_tensors
        scale = grads[0]
        narrow_weight = weight.to(hidden.dtype)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=scale.dtype) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[0], ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            d_logits = _logit_gradients(
                hidden[rows], narrow_weight, labels[rows], log_normalisers[rows]
            )
            if d_hidden is not None:
                torch.mm(d_logits, narrow_weight, out=d_hidden[rows])
            if d_weight is not None and d_weight.dtype == d_logits.dtype:
                d_weight.addmm_(d_logits.t(), hidden[rows])
            elif d_weight is not None:
                d_weight.add_(torch.mm(d_logits.t(), hidden[rows]))
        if d_hidden is not None:
            d_hidden.mul_(scale)
        if d_weight is not None:
            d_weight = d_weight.mul_(scale).to(weight.dtype)
        return d_hidden, d_weight, None, None


def _forward(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Losses `[M]`, and log normalisers `[M]` that are +inf where masked."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    losses = torch.empty(hidden.shape[0], dtype=dtype, device=hidden.device)
    log_normalisers = torch.empty_like(losses)
    for start in range(0, hidden.shape[0], chunk):
        rows = slice(start, start + chunk)
        logits = logits_of(hidden[rows], weight)
        counted = labels[rows] != MASKED
        chosen = logits.gather(1, labels[rows].clamp(min=0)[:, None]).squeeze(1)
        largest = logits.amax(dim=1)
        total = logits.sub_(largest[:, None]).exp_().sum(dim=1).log_().add_(largest)
        losses[rows] = torch.where(counted, total - chosen, 0.0)
        log_normalisers[rows] = torch.where(counted, total, float("inf"))
    return losses, log_normalisers


def _logit_gradients(
    hidden: Tensor, weight: Tensor, labels: Tensor, log_normalisers: Tensor
) -> Tensor:
    """`softmax - one_hot` in hidden's dtype; masked rows are exactly 0 because exp(-inf) is."""
    gradients = logits_of(hidden, weight).sub_(log_normalisers[:, None]).exp_()
    counted = (labels != MASKED).to(gradients.dtype)
    gradients.scatter_add_(1, labels.clamp(min=0)[:, None], -counted[:, None])
    return gradients.to(hidden.dtype)
