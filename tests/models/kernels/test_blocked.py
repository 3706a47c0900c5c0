"""Blocked softmax attention against the dense mask, and the size of everything it makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models import reference
from models.kernels import blocked
from tests.models.kernels.cases import (
    assert_results,
    documents,
    poisoned_allocations,
    softmax_operands,
    softmax_results,
)
from tests.support.closeness import assert_close

WINDOWS = [None, 1, 2, 63, 64, 65, 200, 301, 302, 1000]
LENGTHS = {
    "one token": (1, 1),
    "odd length": (301, 301),
    "decode": (1, 90),
    "prefill after a cache": (70, 301),
    "short prefill after a long cache": (3, 700),
    "prefill in several blocks": (700, 750),
}


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_blocks_are_the_dense_mask(lengths: tuple[int, int], window: int | None) -> None:
    operands = softmax_operands(2, *lengths)
    with poisoned_allocations():
        actual = softmax_results(blocked.softmax_attention, operands, window=window, sequence=None)
    expected = softmax_results(reference.softmax_attention, operands, window=window, sequence=None)
    assert_results(actual, expected, relative=1e-12)


@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 200])
@pytest.mark.parametrize("lengths", [(301, 301), (193, 193), (130, 301), (700, 750)], ids=str)
def test_groups_of_bands_hand_their_last_keys_on(
    lengths: tuple[int, int], window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocked, "_GROUP_TOKENS", 130)
    operands = softmax_operands(2, *lengths)
    actual = softmax_results(blocked.softmax_attention, operands, window=window, sequence=None)
    expected = softmax_results(reference.softmax_attention, operands, window=window, sequence=None)
    assert_results(actual, expected, relative=1e-12)


@pytest.mark.parametrize("window", [None, 1, 20, 64, 400])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_documents_do_not_see_each_other(groups: int, window: int | None) -> None:
    operands = softmax_operands(3, 201, 201, groups=groups)
    sequence = documents([[1, 99, 1, 100], [201], [100, 101]])
    actual = softmax_results(blocked.softmax_attention, operands, window=window, sequence=sequence)
    expected = softmax_results(
        reference.softmax_attention, operands, window=window, sequence=sequence
    )
    assert_results(actual, expected, relative=1e-12)


def test_rows_that_are_one_document_need_no_splitting(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("rows without inner boundaries must stay one batch")

    monkeypatch.setattr(blocked, "_attend_documents", forbidden)
    q, k, v = softmax_operands(2, 30, 30)
    results = [
        blocked.softmax_attention(q, k, v, scale=1.0, window=5, sequence=sequence)
        for sequence in (documents([[30], [30]]), None)
    ]
    assert torch.equal(*results)


def test_a_window_as_long_as_the_row_is_full_attention() -> None:
    q, k, v = softmax_operands(1, 300, 300)
    full, windowed, shorter = (
        blocked.softmax_attention(q, k, v, scale=1.0, window=window, sequence=None)
        for window in (None, 300, 299)
    )
    assert torch.equal(full, windowed)
    assert not torch.equal(full, shorter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 100])
def test_lower_precisions_stay_close(window: int | None, dtype: torch.dtype) -> None:
    operands = softmax_operands(1, 260, 260, dtype=dtype)
    wide = [x.double() for x in operands]
    actual = softmax_results(blocked.softmax_attention, operands, window=window, sequence=None)
    expected = softmax_results(reference.softmax_attention, wide, window=window, sequence=None)
    assert actual["out"].dtype is dtype
    assert_results(actual, expected, relative=2e-2 if dtype is torch.bfloat16 else 1e-5)


class Sizes(TorchDispatchMode):
    """Records every operator called and the elements of the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.operators: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operators.add(str(func.overloadpacket))
        made = result if isinstance(result, tuple | list) else (result,)
        for x in made:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("window", [None, 100], ids=["full", "window"])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("rows", [1, 2])
def test_nothing_grows_with_the_square_of_the_length(
    rows: int, packed: bool, window: int | None, dtype: torch.dtype
) -> None:
    sizes = []
    for tokens in (512, 1024):
        operands = softmax_operands(rows, tokens, tokens, dtype=dtype)
        lengths = [[tokens // 2 + 1, tokens // 2 - 1]] * rows
        sequence = documents(lengths) if packed else None
        with Sizes() as seen:
            softmax_results(blocked.softmax_attention, operands, window=window, sequence=sequence)
        # torch's fused CPU kernel; its fallback would hold the whole matrix.
        assert "aten._scaled_dot_product_flash_attention_for_cpu" in seen.operators
        assert "aten._scaled_dot_product_attention_math" not in seen.operators
        assert "aten.bmm" not in seen.operators
        sizes.append(seen.largest)
    assert sizes[0] < rows * 512 * 512 / 4
    assert sizes[1] <= 2.5 * sizes[0]


def test_the_size_recorder_sees_a_full_matrix() -> None:
    operands = softmax_operands(1, 256, 256)
    with Sizes() as seen:
        softmax_results(reference.softmax_attention, operands, window=None, sequence=None)
    assert seen.largest >= 4 * 256 * 256


def test_keys_may_not_be_fewer_than_queries() -> None:
    q, k, v = softmax_operands(1, 5, 4)
    with pytest.raises(ValueError, match=r"k tokens \(4\) must be q's.*got 5"):
        blocked.softmax_attention(q, k, v, scale=1.0, window=None, sequence=None)


def test_cached_keys_and_documents_do_not_mix() -> None:
    q, k, v = softmax_operands(1, 4, 5)
    with pytest.raises(ValueError, match="Pass sequence=None for cached keys"):
        blocked.softmax_attention(q, k, v, scale=1.0, window=None, sequence=documents([[4]]))


def test_decoding_a_window_needs_only_its_keys() -> None:
    q, k, v = softmax_operands(2, 1, 50)
    whole = blocked.softmax_attention(q, k, v, scale=1.0, window=7, sequence=None)
    ring = blocked.softmax_attention(q, k[:, -7:], v[:, -7:], scale=1.0, window=7, sequence=None)
    assert_close(whole, ring, relative=1e-14)
