"""The flex masks, run by torch's eager flex attention; the compiled one is tested on GPUs."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import (
    AuxOutput,
    AuxRequest,
    BlockMask,
    create_block_mask,
    flex_attention,
)

from models import reference
from models.kernels import SinkKeys, flex
from models.kernels.fallback import warn_once
from tests.models.kernels.cases import (
    assert_results,
    documents,
    double,
    sink_operands,
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
    sink_k, sink_v, own = sink_operands([q, k, v], 6, own_queries=True)
    for sinks in (None, SinkKeys(sink_k, sink_v), SinkKeys(sink_k, sink_v, own)):
        out, expected = (
            kernel.softmax_attention(
                q, k, v, scale=0.3, window=window, sequence=sequence, sinks=sinks
            )
            for kernel in (flex, reference)
        )
        assert_results({"out": out}, {"out": expected}, relative=1e-5)


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_mask: BlockMask | None,
    scale: float,
    enable_gqa: bool,
    return_aux: AuxRequest | None = None,
) -> Tensor | tuple[Tensor, AuxOutput]:
    """flex attention by plain autograd: both of its results are differentiable.

    The eager form has no backward on CPUs. This one is given the mask's function to apply.
    """
    assert enable_gqa is (q.shape[1] != k.shape[1])
    assert q.shape[0] == k.shape[0]
    group = q.shape[1] // k.shape[1]
    scores = scale * q @ k.repeat_interleave(group, dim=1).mT
    if block_mask is not None:
        index = [torch.arange(size) for size in (len(q), q.shape[1], q.shape[2], k.shape[2])]
        seen = block_mask.mask_mod(*torch.meshgrid(*index, indexing="ij"))
        scores = scores.masked_fill(~seen, float("-inf"))
    out = scores.softmax(-1) @ v.repeat_interleave(group, dim=1)
    if return_aux is None:
        return out
    assert return_aux == AuxRequest(lse=True)
    return out, AuxOutput(lse=scores.logsumexp(-1))


@pytest.mark.parametrize("own_queries", [False, True], ids=["q", "own q"])
@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize("rows", [None, [[30, 120], [150]]], ids=["one document", "packed"])
def test_sinks_are_merged_with_gradients_through_the_log_sum_exp(
    rows: list[list[int]] | None,
    window: int | None,
    own_queries: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flex, "_compiled", lambda: (dense, create_block_mask))
    flex._shared_mask.cache_clear()
    operands = softmax_operands(2, 150, 150, dtype=torch.float32, dim=16)
    operands += sink_operands(operands, 6, own_queries=own_queries)
    sequence = None if rows is None else documents(rows)
    assert_results(
        softmax_results(flex.softmax_attention, operands, window=window, sequence=sequence),
        softmax_results(
            reference.softmax_attention, double(operands), window=window, sequence=sequence
        ),
        relative=1e-5,
    )


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
    operands += sink_operands(operands, 2, own_queries=False)
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        actual = softmax_results(flex.softmax_attention, operands, window=4, sequence=None)
    assert ("no torch.float64 kernel" in caplog.text) is warned
    expected = softmax_results(reference.softmax_attention, operands, window=4, sequence=None)
    assert_results(actual, expected, relative=1e-5)
