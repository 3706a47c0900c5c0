"""Blocked attention with sinks against the dense mask, and the size of everything it makes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models import reference
from models.kernels import SinkKeys, blocked, fused_sinks
from models.softmax_attention import KeyValueCache
from tests.models.kernels.cases import (
    assert_results,
    documents,
    poisoned_allocations,
    sink_operands,
    softmax_operands,
    softmax_results,
)
from tests.models.kernels.test_blocked import Sizes
from tests.support.allocations import peak_bytes
from tests.support.closeness import assert_close

LENGTHS = {
    "one token": (1, 1),
    "odd length": (301, 301),
    "decode": (1, 90),
    "prefill after a cache": (70, 301),
    "prefill in several blocks": (700, 750),
}
QUERIES = pytest.mark.parametrize("own_queries", [False, True], ids=["q", "own q"])
DEVICES = pytest.mark.parametrize("merged", [True, False], ids=["cpu", "other device"])


@pytest.fixture
def other_device(merged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs where torch has no fused CPU kernel."""
    if not merged:
        monkeypatch.setattr(fused_sinks, "takes_causal", lambda q: False)


@DEVICES
@QUERIES
@pytest.mark.usefixtures("other_device")
@pytest.mark.parametrize("window", [None, 1, 64, 200, 301, 1000])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_sinks_are_more_columns_of_the_dense_mask(
    lengths: tuple[int, int], window: int | None, own_queries: bool
) -> None:
    operands = softmax_operands(2, *lengths)
    operands += sink_operands(operands, 7, own_queries=own_queries)
    with poisoned_allocations():
        actual = softmax_results(blocked.softmax_attention, operands, window=window, sequence=None)
    expected = softmax_results(reference.softmax_attention, operands, window=window, sequence=None)
    assert_results(actual, expected, relative=1e-12)


@DEVICES
@QUERIES
@pytest.mark.usefixtures("other_device")
@pytest.mark.parametrize("window", [None, 20, 64, 400])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_every_document_sees_the_sinks(groups: int, window: int | None, own_queries: bool) -> None:
    operands = softmax_operands(3, 201, 201, groups=groups)
    operands += sink_operands(operands, 5, own_queries=own_queries)
    sequence = documents([[1, 99, 1, 100], [201], [100, 101]])
    actual = softmax_results(blocked.softmax_attention, operands, window=window, sequence=sequence)
    expected = softmax_results(
        reference.softmax_attention, operands, window=window, sequence=sequence
    )
    assert_results(actual, expected, relative=1e-12)


def test_sinks_with_large_scores_take_all_and_with_small_ones_nothing() -> None:
    q, k, v = softmax_operands(1, 90, 90)
    sink_k, sink_v = q.new_zeros(3, 2, 8), torch.ones(3, 2, 8, dtype=q.dtype)
    own = torch.full_like(q, 1e3)
    out = [
        blocked.softmax_attention(
            q, k, v, scale=1.0, window=20, sequence=None, sinks=SinkKeys(keys, sink_v, own)
        )
        for keys in (sink_k + 1, sink_k - 1)
    ]
    alone = blocked.softmax_attention(q, k, v, scale=1.0, window=20, sequence=None)
    assert torch.equal(out[0], torch.ones_like(q))
    assert torch.equal(out[1], alone)


@QUERIES
@pytest.mark.parametrize("window", [None, 16])
def test_decoding_from_a_cache_continues_the_prefill(window: int | None, own_queries: bool) -> None:
    q, k, v = softmax_operands(2, 60, 60)
    sink_k, sink_v, *rest = sink_operands([q, k, v], 4, own_queries=own_queries)

    def attend(where: slice, keys: Tensor, values: Tensor, visible: int | None) -> Tensor:
        sinks = SinkKeys(sink_k, sink_v, *(x[:, where] for x in rest))
        return blocked.softmax_attention(
            q[:, where], keys, values, scale=0.3, window=visible, sequence=None, sinks=sinks
        )

    whole = attend(slice(None), k, v, window)
    cache, outputs = KeyValueCache(window), []
    for start, stop in ((0, 40), (40, 45), *((step, step + 1) for step in range(45, 60))):
        where = slice(start, stop)
        keys, values = cache.append(k[:, where], v[:, where])
        outputs.append(attend(where, keys, values, None if stop - start == 1 else window))
    assert_close(torch.cat(outputs, dim=1), whole, relative=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 100])
def test_lower_precisions_stay_close(window: int | None, dtype: torch.dtype) -> None:
    operands = softmax_operands(1, 260, 260, dtype=dtype)
    operands += sink_operands(operands, 9, own_queries=True)
    wide = [x.double() for x in operands]
    actual = softmax_results(blocked.softmax_attention, operands, window=window, sequence=None)
    expected = softmax_results(reference.softmax_attention, wide, window=window, sequence=None)
    assert {x.dtype for x in actual.values()} == {dtype}
    assert_results(actual, expected, relative=2e-2 if dtype is torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("window", [None, 30])
def test_operands_and_gradients_may_be_any_views(window: int | None) -> None:
    operands = softmax_operands(2, 90, 90)
    operands += sink_operands(operands, 3, own_queries=True)
    views = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in operands]
    grads = []
    for kernel, inputs in ((blocked, views), (reference, operands)):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = kernel.softmax_attention(
            *leaves[:3], scale=0.3, window=window, sequence=None, sinks=SinkKeys(*leaves[3:])
        )
        # Its gradient is one number, expanded.
        grads.append(torch.autograd.grad(out.sum(), leaves))
    for actual, expected in zip(*grads, strict=True):
        assert_close(actual, expected, relative=1e-12, absolute=1e-12)


@QUERIES
@pytest.mark.parametrize("window", [None, 100], ids=["full", "window"])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
def test_nothing_grows_with_the_square_of_the_length(
    packed: bool, window: int | None, own_queries: bool
) -> None:
    sizes, peaks = [], []
    # The fused kernel works in larger blocks from 768 queries on.
    for tokens in (1024, 2048):
        operands = softmax_operands(1, tokens, tokens, dtype=torch.float32)
        operands += sink_operands(operands, 64, own_queries=own_queries)
        sequence = documents([[tokens // 2 + 1, tokens // 2 - 1]]) if packed else None

        def work(operands: list[Tensor] = operands, sequence: object = sequence) -> None:
            softmax_results(blocked.softmax_attention, operands, window=window, sequence=sequence)  # type: ignore[arg-type]

        with Sizes() as seen:
            work()
        assert "aten._scaled_dot_product_flash_attention_for_cpu_backward" in seen.operators
        assert "aten._scaled_dot_product_attention_math" not in seen.operators
        assert "aten.bmm" not in seen.operators
        sizes.append(seen.largest)
        peaks.append(peak_bytes(work, repeats=2))
    assert sizes[0] < 1024 * 1024 / 4
    assert sizes[1] <= 2.5 * sizes[0]
    assert peaks[1] <= 2.5 * peaks[0]


def test_the_backward_keeps_no_more_than_without_sinks() -> None:
    """Beside the operands: one output and one sum a query, as torch's own function."""
    operands = softmax_operands(1, 256, 256, dtype=torch.float32)
    leaves = [x.requires_grad_() for x in operands + sink_operands(operands, 8, own_queries=False)]
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = blocked.softmax_attention(
            *leaves[:3], scale=1.0, window=None, sequence=None, sinks=SinkKeys(*leaves[3:])
        )
    sums = 4 * 256 * 4
    assert sum(kept.values()) == sum(x.nbytes for x in leaves) + out.nbytes + sums
