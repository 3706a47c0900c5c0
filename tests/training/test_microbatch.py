"""Cutting rows: nothing lost, nothing counted twice."""

from __future__ import annotations

import pytest
import torch

from training.microbatch import Rows, microbatches, rank_share


def rows(count: int) -> Rows:
    tokens = torch.arange(count * 3).reshape(count, 3)
    return Rows(tokens, tokens + 1, torch.zeros_like(tokens))


@pytest.mark.parametrize(("count", "size"), [(4, 2), (5, 2), (1, 3), (4, 4)])
def test_microbatches_are_the_rows_in_order(count: int, size: int) -> None:
    parts = list(microbatches(rows(count), size))
    assert all(part.tokens.shape[0] <= size for part in parts)
    assert torch.equal(torch.cat([part.tokens for part in parts]), rows(count).tokens)
    assert torch.equal(torch.cat([part.labels for part in parts]), rows(count).labels)


@pytest.mark.parametrize(("count", "size"), [(4, 2), (5, 2), (1, 3), (3, 2), (2, 5)])
def test_every_rank_has_as_many_rows_and_each_target_once(count: int, size: int) -> None:
    shares = [rank_share(rows(count), rank=rank, size=size) for rank in range(size)]
    assert len({share.tokens.shape for share in shares}) == 1
    labels = torch.cat([share.labels for share in shares])
    assert torch.equal(labels[labels >= 0].reshape(-1, 3), rows(count).labels)
