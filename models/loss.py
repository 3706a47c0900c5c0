"""Next-token loss in token chunks: logits exist for one chunk at a time, forward and backward.

The backward computes each chunk's logits again, so peak memory does not grow with the number of
tokens. Nothing here changes its inputs. The vocabulary may be cut over ranks: each computes the
logits of its own rows, and two small reductions (a maximum and a sum, whatever the number of
chunks) make the loss, which is equal on all ranks. The gradient of `hidden` is then this rank's
part: its rows' share of a sum over ranks, which belongs to the region that brought `hidden` in.

Shape letters: M tokens, D hidden, V vocabulary (the rows held here, padding included).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.vocabulary import VocabularyShard

MASKED = -100
"""Label of a token that predicts nothing."""


def logits_of(hidden: Tensor, weight: Tensor, vocabulary: VocabularyShard | None = None) -> Tensor:
    """Logits `[..., V]` of `hidden` `[..., D]`, multiplied in hidden's dtype, at least float32.

    Of a cut vocabulary these are this rank's columns; those of padding rows are minus infinity.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logits = F.linear(hidden, weight.to(hidden.dtype)).to(dtype)
    if vocabulary is not None:
        logits[..., vocabulary.num_rows :] = -math.inf
    return logits


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    chunk_tokens: int,
    vocabulary: VocabularyShard | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """Summed cross entropy of `labels` `[M]` under `hidden` `[M, D]` and head `weight` `[V, D]`.

    Labels are token ids of the whole vocabulary; those of -100 count nothing, any other that no
    rank holds makes the loss infinite. Weight gradients accumulate over chunks in at least float32.
    `z_loss` times the squared log normaliser is added for each token that counts.

    Returns:
        A scalar in at least float32: the sum, not the mean (callers know the global count).
    """
    loss: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, labels, chunk_tokens, vocabulary, z_loss
    )
    return loss


@torch.no_grad()
def chunked_token_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    chunk_tokens: int,
    vocabulary: VocabularyShard | None = None,
) -> Tensor:
    """Cross entropy of each token `[M]`, 0 where masked, without gradients; arguments as above."""
    return _forward(hidden, weight, labels, chunk_tokens, vocabulary)[0]


def head_gradients(  # noqa: PLR0913 - a head, where its gradients go, and how they arise
    hidden: Tensor,
    weight: Tensor,
    scale: Tensor,
    d_logits_of: Callable[[slice, Tensor], Tensor],
    *,
    chunk_tokens: int,
    vocabulary: VocabularyShard | None,
    needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `hidden` and `weight`, as far as `needed`, for a loss over their logits.

    `d_logits_of(rows, logits)` maps the logits of one chunk of tokens to their gradients, which are
    multiplied in hidden's dtype; `scale` is the gradient of the loss. Padding rows get 0.
    """
    true = true_rows(vocabulary)
    weight_dtype, weight = weight.dtype, weight.to(hidden.dtype)
    d_hidden = torch.empty_like(hidden) if needed[0] else None
    d_weight = torch.zeros_like(weight, dtype=scale.dtype) if needed[1] else None
    for start in range(0, hidden.shape[0], chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        d_logits = d_logits_of(rows, logits_of(hidden[rows], weight, vocabulary))
        d_logits = d_logits.to(hidden.dtype)[:, true]
        if d_hidden is not None:
            torch.mm(d_logits, weight[true], out=d_hidden[rows])
        if d_weight is not None and d_weight.dtype == d_logits.dtype:
            d_weight[true].addmm_(d_logits.t(), hidden[rows])
        elif d_weight is not None:
            d_weight[true].add_(torch.mm(d_logits.t(), hidden[rows]))
    if d_hidden is not None:
        d_hidden.mul_(scale)
    if d_weight is not None:
        d_weight = d_weight.mul_(scale).to(weight_dtype)
    return d_hidden, d_weight


def true_rows(vocabulary: VocabularyShard | None) -> slice:
    """Rows of a head, or columns of its logits, that are not padding."""
    return slice(None if vocabulary is None else vocabulary.num_rows)


def finite_maximum(logits: Tensor) -> Tensor:
    """Largest of each row; finite where there are only padding columns, so that exp gives 0."""
    return logits.amax(dim=1).clamp_(min=torch.finfo(logits.dtype).min)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913 - autograd passes by position
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        chunk: int,
        vocabulary: VocabularyShard | None,
        z_loss: float,
    ) -> Tensor:
        losses, log_normalisers = _forward(hidden, weight, labels, chunk, vocabulary)
        ctx.save_for_backward(hidden, weight, labels, log_normalisers)
        ctx.chunk, ctx.vocabulary, ctx.z_loss = chunk, vocabulary, z_loss
        if z_loss:
            losses += z_loss * log_normalisers.masked_fill(labels == MASKED, 0.0).square()
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, log_normalisers = ctx.saved_tensors

        def d_logits_of(rows: slice, logits: Tensor) -> Tensor:
            """`softmax - one_hot`; masked rows are exactly 0 because exp(-inf) is."""
            d_logits = logits.sub_(log_normalisers[rows, None]).exp_()
            if ctx.z_loss:
                factor = 1.0 + 2.0 * ctx.z_loss * log_normalisers[rows, None]
                d_logits.mul_(factor.masked_fill(labels[rows, None] == MASKED, 0.0))
            index, is_held = _columns(labels[rows], ctx.vocabulary)
            return d_logits.scatter_add_(1, index, -is_held.to(d_logits.dtype))

        gradients = head_gradients(
            hidden, weight, grads[0], d_logits_of,
            chunk_tokens=ctx.chunk, vocabulary=ctx.vocabulary, needed=ctx.needs_input_grad,
        )  # fmt: skip
        return *gradients, None, None, None, None


def _forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk: int,
    vocabulary: VocabularyShard | None,
) -> tuple[Tensor, Tensor]:
    """Losses `[M]`, and log normalisers `[M]` that are +inf where masked."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    chosen = torch.empty(hidden.shape[0], dtype=dtype, device=hidden.device)
    largest, total = torch.empty_like(chosen), torch.empty_like(chosen)
    weight = weight.to(hidden.dtype)
    for start in range(0, hidden.shape[0], chunk):
        rows = slice(start, start + chunk)
        logits = logits_of(hidden[rows], weight, vocabulary)
        index, is_held = _columns(labels[rows], vocabulary)
        chosen[rows] = torch.where(is_held, logits.gather(1, index), -math.inf).squeeze(1)
        largest[rows] = finite_maximum(logits)
        total[rows] = logits.sub_(largest[rows, None]).exp_().sum(dim=1)
    if vocabulary is not None:
        here = largest
        largest, chosen = vocabulary.max(torch.stack([here, chosen])).unbind()
        total = vocabulary.sum(total.mul_((here - largest).exp_()))
    log_normalisers = total.log_().add_(largest)
    counted = labels != MASKED
    losses = torch.where(counted, log_normalisers - chosen, 0.0)
    return losses, torch.where(counted, log_normalisers, math.inf)


def _columns(labels: Tensor, vocabulary: VocabularyShard | None) -> tuple[Tensor, Tensor]:
    """Column of each label in this rank's logits and whether it is held here, both `[M, 1]`."""
    if vocabulary is None:
        return labels.clamp(min=0)[:, None], (labels >= 0)[:, None]
    column = (labels - vocabulary.first_row)[:, None]
    is_held = (column >= 0) & (column < vocabulary.num_rows)
    return torch.where(is_held, column, 0), is_held
