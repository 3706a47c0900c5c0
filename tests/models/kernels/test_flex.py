"""The flex masks, run by torch's eager flex attention; the compiled one is tested on GPUs."""

from __future__ import annotations

import logging

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from models import reference
from models.kernels import flex
from models.kernels.fallback import warn_once
from tests.models.kernels.cases import (
    assert_results,
    documents,
    softmax_operands,
    softmax_results,
)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_compiled", lambda: (flex_attention, create_block_mask))
    flex._shared_mask.cache_clear()


@pytest.mark.usefixtures("eager")
@pytest.mark.filterwarnings("ignore:.*flex_attention.*")
@pytest.mark.parametrize("window", [None, 1, 40, 1000])
@pytest.mark.parametrize(
    ("lengths", "rows"),
    [((150, 150), None), ((150, 150), [[30, 120], [150]]), ((20, 150), None)],
    ids=["one document", "packed", "cached keys"],
)
def test_masks_show_documents_and_window(
    lengths: tuple[int, int], rows: list[list[int]] | None, window: int | None
) -> None:
    q, k, v = softmax_operands(2, *lengths, dtype=torch.float32, dim=16)
    sequence = None if rows is None else documents(rows)
    out = flex.softmax_attention(q, k, v, scale=0.3, window=window, sequence=sequence)
    expected = reference.softmax_attention(q, k, v, scale=0.3, window=window, sequence=sequence)
    assert_results({"out": out}, {"out": expected}, relative=1e-5)


@pytest.mark.usefixtures("eager")
@pytest.mark.filterwarnings("ignore:.*flex_attention.*")
def test_the_layers_of_a_packed_batch_share_one_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_recent", {})
    monkeypatch.setattr(flex, "_KEPT_MASKS", 2)
    q, k, v = softmax_operands(1, 20, 20, dtype=torch.float32, dim=16)
    first, second = documents([[5, 15]]), documents([[10, 10]])
    kept = []
    for sequence in (first, first, second, documents([[1, 19]])):
        out = flex.softmax_attention(q, k, v, scale=1.0, window=None, sequence=sequence)
        slow = reference.softmax_attention(q, k, v, scale=1.0, window=None, sequence=sequence)
        assert_results({"out": out}, {"out": slow}, relative=1e-5)
        kept.append([address for address, _ in flex._recent])
    one, two = id(first.document_ids), id(second.document_ids)
    assert kept[:3] == [[one], [one], [one, two]]
    assert kept[3][0] == two
    assert len(kept[3]) == 2


@pytest.mark.parametrize(
    ("queries", "dtype", "warned"), [(9, torch.float64, True), (1, torch.float32, False)]
)
def test_float64_and_decoding_go_to_the_blocked_kernel(
    queries: int, dtype: torch.dtype, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    operands = softmax_operands(1, queries, 9, dtype=dtype)
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        actual = softmax_results(flex.softmax_attention, operands, window=4, sequence=None)
    assert ("no torch.float64 kernel" in caplog.text) is warned
    expected = softmax_results(reference.softmax_attention, operands, window=4, sequence=None)
    assert_results(actual, expected, relative=1e-5)
