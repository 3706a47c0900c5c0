"""Rows of tokens that go through a model at once, cut out of a batch. Shape letters: R, T."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.engine_protocol import Microbatch


@dataclass(frozen=True, slots=True)
class Rows:
    """Three int64 `[R, T]` tensors; see `parallel.engine.Microbatch`."""

    tokens: Tensor
    labels: Tensor
    document_ids: Tensor


def microbatches(rows: Microbatch, microbatch_rows: int) -> Iterator[Rows]:
    """Cut `[R, T]` rows into pieces of at most `microbatch_rows` rows, in order."""
    for start in range(0, rows.tokens.shape[0], microbatch_rows):
        yield row_range(rows, start, start + microbatch_rows)


def row_range(rows: Microbatch, start: int, end: int) -> Rows:
    """Rows `start` to `end` (excluded), fewer where the batch ends."""
    return Rows(rows.tokens[start:end], rows.labels[start:end], rows.document_ids[start:end])


def rank_share(rows: Microbatch, *, rank: int, size: int) -> Rows:
    """This rank's equal share of `[R, T]` rows; ranks without enough get masked copies.

    Every rank must run as many rows as the others, so the batch is filled up with rows that count
    nothing.
    """
    per_rank = -(-rows.tokens.shape[0] // size)
    missing = per_rank * size - rows.tokens.shape[0]
    padded = Rows(
        tokens=torch.cat([rows.tokens, rows.tokens[:1].expand(missing, -1)]),
        labels=torch.cat([rows.labels, torch.full_like(rows.labels[:1], -100).expand(missing, -1)]),
        document_ids=torch.cat([rows.document_ids, rows.document_ids[:1].expand(missing, -1)]),
    )
    return row_range(padded, rank * per_rank, (rank + 1) * per_rank)
