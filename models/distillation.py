"""What a student learns from a frozen teacher: its distribution over tokens, its hidden states.

Both are sums over the tokens that count; callers divide by the global count. The teacher never gets
a gradient. As in `models.loss`, logits exist for one chunk of tokens at a time, in forward and in
backward, no input changes, and a vocabulary cut over ranks gives the same loss on all of them.

Shape letters: B batch, T tokens, M tokens of all rows, D hidden, V vocabulary held here.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.loss import MASKED, finite_maximum, head_gradients, logits_of, true_rows
from models.vocabulary import VocabularyShard


def chunked_kl(  # noqa: PLR0913 - two models, one set of tokens
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    *,
    chunk_tokens: int,
    temperature: float,
    vocabulary: VocabularyShard | None = None,
) -> Tensor:
    """Summed `tau^2 KL(softmax(teacher / tau) || softmax(student / tau))`, tau the temperature.

    The factor tau^2 keeps the size of gradients independent of tau (Hinton et al. 2015, section 2).

    Args:
        hidden: the student's `[M, D]`; its gradient is this rank's part of a sum over ranks.
        weight: the student's head `[V, D]`.
        teacher_hidden: `[M, D']`, of any size and dtype.
        teacher_weight: `[V', D']` with the same true rows as `weight`; read again in backward, so
            it must not be freed or moved in between.
        labels: `[M]`; tokens of label -100 count nothing, otherwise labels do not matter.
        chunk_tokens: tokens whose logits exist at a time.
        temperature: tau, above 0.
        vocabulary: the rows of both heads where they are cut over ranks.

    Returns:
        A scalar in at least float32, equal on all ranks.
    """
    loss: Tensor = _ChunkedKl.apply(  # type: ignore[no-untyped-call]
        hidden, weight, teacher_hidden, teacher_weight, labels, chunk_tokens, temperature,
        vocabulary,
    )  # fmt: skip
    return loss


def hidden_mse(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Sum over tokens of the mean over channels of `(student - teacher)^2`, in at least float32.

    Args:
        student: `[B, T, D]`.
        teacher: `[B, T, D]`.
        labels: `[B, T]`; tokens of label -100 count nothing. Where a rank holds some of the tokens,
            theirs, and the result is its part of the sum.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    difference = student.to(dtype) - teacher.detach().to(dtype)
    difference = difference.masked_fill(labels[..., None] == MASKED, 0.0)
    return difference.square().mean(dim=-1).sum()


class _ChunkedKl(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913 - autograd passes by position
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        labels: Tensor,
        chunk: int,
        temperature: float,
        vocabulary: VocabularyShard | None,
    ) -> Tensor:
        ctx.chunk, ctx.temperature, ctx.vocabulary = chunk, temperature, vocabulary
        divergences, log_normalisers = _divergences(
            (hidden, weight), (teacher_hidden, teacher_weight), chunk, temperature, vocabulary
        )
        log_normalisers.masked_fill_(labels == MASKED, math.inf)
        ctx.save_for_backward(hidden, weight, teacher_hidden, teacher_weight, log_normalisers)
        return divergences.masked_fill_(labels == MASKED, 0.0).sum() * temperature**2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, teacher_hidden, teacher_weight, log_normalisers = ctx.saved_tensors
        teacher_weight = teacher_weight.to(teacher_hidden.dtype)
        true = true_rows(ctx.vocabulary)

        def d_logits_of(rows: slice, logits: Tensor) -> Tensor:
            """`tau (softmax - teacher's softmax)`; masked rows are 0 because exp(-inf) is."""
            wanted = logits_of(teacher_hidden[rows], teacher_weight, ctx.vocabulary)
            for each, log_normaliser in zip((wanted, logits), log_normalisers, strict=True):
                each.div_(ctx.temperature).sub_(log_normaliser[rows, None]).exp_()
            return logits[:, true].sub_(wanted[:, true]).mul_(ctx.temperature)

        gradients = head_gradients(
            hidden, weight, grads[0], d_logits_of,
            chunk_tokens=ctx.chunk, vocabulary=ctx.vocabulary, needed=ctx.needs_input_grad,
        )  # fmt: skip
        return *gradients, None, None, None, None, None, None


def _divergences(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    chunk: int,
    temperature: float,
    vocabulary: VocabularyShard | None,
) -> tuple[Tensor, Tensor]:
    """KL of each token `[M]`, and log normalisers `[2, M]`, the teacher's first."""
    heads = [(hidden, weight.to(hidden.dtype)) for hidden, weight in (teacher, student)]
    num_tokens, dtype = student[0].shape[0], torch.promote_types(student[0].dtype, torch.float32)
    true = true_rows(vocabulary)
    largest = torch.empty(2, num_tokens, dtype=dtype, device=student[0].device)
    # Sums of exp(teacher), exp(student) and exp(teacher) * (teacher - student).
    sums = torch.empty(3, num_tokens, dtype=dtype, device=student[0].device)
    for start in range(0, num_tokens, chunk):
        rows = slice(start, start + chunk)
        logits = [logits_of(h[rows], w, vocabulary).to(dtype).div_(temperature) for h, w in heads]
        difference = logits[0][:, true] - logits[1][:, true]
        for index, each in enumerate(logits):
            largest[index, rows] = finite_maximum(each)
            sums[index, rows] = each.sub_(largest[index, rows, None]).exp_().sum(dim=1)
        sums[2, rows] = difference.mul_(logits[0][:, true]).sum(dim=1)
    if vocabulary is not None:
        here = largest
        largest = vocabulary.max(here)
        factors = (here - largest).exp_()
        sums = vocabulary.sum(sums.mul_(torch.cat([factors, factors[:1]])))
    log_normalisers = sums[:2].log().add_(largest)
    return sums[2] / sums[0] - log_normalisers[0] + log_normalisers[1], log_normalisers
