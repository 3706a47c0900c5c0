"""Tiles cover a batch once, survive a round trip, and know who shares a document."""

from __future__ import annotations

import pytest
import torch

from models.kernels import tiling
from models.kernels.tiling import Tiling, Workspace, load, load_heads, split_dim, store
from tests.models.kernels.cases import documents, linear_operands, poisoned_allocations


@pytest.mark.parametrize("elements", [1, 1000, 100_000])
@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (3, 31), (7, 100), (2, 64)])
def test_tiles_cover_every_token_of_every_row_once(
    rows: int, tokens: int, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiling, "_TILE_ELEMENTS", elements)
    plan = Tiling.of(torch.zeros(rows, tokens, 4, 8))
    seen = torch.zeros(rows, tokens)
    for row_block in plan.row_blocks():
        for span in plan.spans():
            seen[row_block, span] += 1
            assert span.start % plan.chunk == 0
    assert torch.equal(seen, torch.ones(rows, tokens))


def test_a_short_row_is_one_chunk_no_longer_than_needed() -> None:
    assert Tiling.of(torch.zeros(1, 5, 4, 8)).chunk == 8


def test_loading_then_storing_a_tile_changes_nothing() -> None:
    x = torch.randn(3, 50, 6, 4)
    where = (slice(1, 3), slice(16, 50), 16)
    with poisoned_allocations():
        loaded = load_heads(Workspace(x), "x", x, where, 2)
    assert loaded.shape == (2, 2, 3, 16, 3, 4)
    assert torch.equal(loaded.flatten(2, 3)[:, :, 34:], torch.zeros(2, 2, 14, 3, 4))
    back = torch.zeros_like(x)
    store(loaded, back[where[:2]])
    assert torch.equal(back[where[:2]], x[where[:2]])
    assert torch.equal(back[0], torch.zeros(50, 6, 4))


def test_a_tile_in_the_middle_of_a_row_knows_the_document_that_enters_it() -> None:
    q, k, v, log_decay, _ = linear_operands(1, 12)
    ids = documents([[4, 5, 3]]).document_ids
    inputs = load(Workspace(q), (q, k, v, log_decay, ids), (slice(0, 1), slice(4, 12), 4), 1.0)
    assert inputs.masks is not None
    assert inputs.masks.enters[0, 0, :, :, 0].int().tolist() == [[0, 0, 0, 0], [1, 0, 0, 0]]
    assert inputs.masks.leaves[0, 0, :, :, 0].int().tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]
    assert inputs.masks.same[0, 0, 1, :, 0].int().tolist() == [
        [1, 0, 0, 0], [0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1],
    ]  # fmt: skip


def test_scratch_memory_is_shared_by_name_and_grows() -> None:
    work = Workspace(torch.zeros(1, dtype=torch.float64))
    first = work.empty("a", 2, 3)
    assert first.dtype is torch.float64
    assert work.empty("a", 6).data_ptr() == first.data_ptr()
    assert work.empty("b", 6).data_ptr() != first.data_ptr()
    assert work.empty("a", 7, 5).shape == (7, 5)


def test_splitting_a_dim_is_a_view() -> None:
    x = torch.arange(24).view(2, 12)[:, :6]
    split = split_dim(x, 1, (3, -1))
    assert split.shape == (2, 3, 2)
    assert split.data_ptr() == x.data_ptr()
