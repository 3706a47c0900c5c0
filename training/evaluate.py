"""Perplexity on held-out text, by how much context a token had; works on any source of losses.

A token's position counts from the start of its document in the row, so position p means p earlier
tokens of the same document to look at. Sums are kept apart from means, so that microbatches and
ranks add up and every figure is weighted by tokens. Shape letters: R rows, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.model import Model
from models.sequence import SequenceContext
from models.spiking.neurons import Spikes
from parallel.engine_protocol import Microbatch
from training.microbatch import microbatches

FIRST_BUCKET_TOKENS = 64

LossFunction = Callable[[Microbatch], Tensor]
"""Maps R rows to per-token losses `[R, T]`, 0 where the label is masked."""


@dataclass(frozen=True, slots=True)
class PositionBuckets:
    """Ranges of positions: 0-63, 64-127, 128-255, ... doubling, up to the row length.

    `window_tokens` (keys a sliding window sees, itself included; None: no such layer) adds one more
    sum, over the positions at or above it.
    """

    sequence_length: int
    window_tokens: int | None

    @property
    def edges(self) -> tuple[int, ...]:
        """First position of each bucket, then the row length."""
        edges = [0]
        edge = FIRST_BUCKET_TOKENS
        while edge < self.sequence_length:
            edges.append(edge)
            edge *= 2
        return (*edges, self.sequence_length)

    @property
    def names(self) -> tuple[str, ...]:
        """`first-last` of each bucket."""
        edges = self.edges
        return tuple(f"{low}-{high - 1}" for low, high in zip(edges, edges[1:], strict=False))

    def sums(self, losses: Tensor, labels: Tensor, document_ids: Tensor) -> Tensor:
        """Loss and token sums `[2, buckets + 1]` in float64; the last column is beyond the window.

        Args:
            losses: `[R, T]`, 0 where masked.
            labels: `[R, T]`, negative where masked.
            document_ids: `[R, T]`.
        """
        positions = SequenceContext.from_document_ids(document_ids.cpu()).positions.reshape(-1)
        counted = (labels.cpu().reshape(-1) >= 0).double()
        values = torch.stack([losses.double().cpu().reshape(-1) * counted, counted])
        inner = torch.tensor(self.edges[1:-1], dtype=torch.int64)
        bucket = torch.bucketize(positions, inner, right=True)
        sums = torch.zeros(2, len(self.names) + 1, dtype=torch.float64)
        sums.index_add_(1, bucket, values)
        if self.window_tokens is not None:
            beyond = (positions >= self.window_tokens).double()
            sums[:, -1] = (values * beyond).sum(dim=1)
        return sums


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Perplexity over all tokens, a position bucket each, and beyond the window.

    `beyond_window` is None when there is no window or no token that far.
    """

    loss: float
    perplexity: float
    num_tokens: int
    by_position: dict[str, float]
    beyond_window: float | None

    @classmethod
    def from_sums(cls, buckets: PositionBuckets, sums: Tensor) -> Perplexity:
        """Turn summed `PositionBuckets.sums` into means.

        Raises:
            ValueError: no token was counted.
        """
        losses, counts = sums[0, :-1], sums[1, :-1]
        num_tokens = round(float(counts.sum()))
        if num_tokens == 0:
            raise ValueError(
                "held-out rows (0 tokens) must hold at least one target: got none. Use more rows "
                "or another data.path."
            )
        loss = float(losses.sum()) / num_tokens
        by_position = {
            name: _exp(float(total) / float(count))
            for name, total, count in zip(buckets.names, losses, counts, strict=True)
            if count > 0
        }
        far = float(sums[1, -1])
        return cls(
            loss=loss,
            perplexity=_exp(loss),
            num_tokens=num_tokens,
            by_position=by_position,
            beyond_window=_exp(float(sums[0, -1]) / far) if far > 0 else None,
        )


def summed_losses(
    rows: Microbatch, loss_function: LossFunction, buckets: PositionBuckets, *, microbatch_rows: int
) -> Tensor:
    """Run rows `[R, T]` through a model in microbatches; `PositionBuckets.sums` of all of them."""
    sums = torch.zeros(2, len(buckets.names) + 1, dtype=torch.float64)
    for part in microbatches(rows, microbatch_rows):
        sums += buckets.sums(loss_function(part), part.labels, part.document_ids)
    return sums


def perplexity_of(
    model: Model, rows: Microbatch, *, spikes: Spikes | None, microbatch_rows: int
) -> Perplexity:
    """Perplexity of a model in one process on held-out rows `[R, T]`."""
    buckets = PositionBuckets(rows.tokens.shape[1], model.config.visible_window_tokens)
    loss_function = model_losses(model, spikes)
    sums = summed_losses(rows, loss_function, buckets, microbatch_rows=microbatch_rows)
    return Perplexity.from_sums(buckets, sums)


def model_losses(model: Model, spikes: Spikes | None) -> LossFunction:
    """The per-token losses of a plain model, on whatever device its weights are."""
    device = next(model.parameters()).device

    def losses(part: Microbatch) -> Tensor:
        found = model.token_losses(
            part.tokens.to(device),
            SequenceContext.from_document_ids(part.document_ids.to(device)),
            part.labels.to(device),
            spikes=spikes,
        )
        assert isinstance(found, Tensor)
        return found

    return losses


def _exp(loss: float) -> float:
    """exp without overflow: a diverged model has infinite perplexity."""
    return math.exp(loss) if loss < 700 else math.inf
