"""What the flash-attn kernel is handed, by a stand-in that computes it from those arguments."""

from __future__ import annotations

import logging
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from models import reference
from models.kernels import flash
from models.kernels.fallback import warn_once
from tests.models.kernels.cases import (
    assert_results,
    documents,
    softmax_operands,
    softmax_results,
)


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
) -> Tensor:
    """flash-attn's documented meaning of its arguments: causal is aligned at the last key."""
    assert causal
    assert window_size[1] == (-1 if window_size[0] == -1 else 0)
    assert cu_seqlens_q.dtype is cu_seqlens_k.dtype is torch.int32
    outputs = []
    for index in range(len(cu_seqlens_q) - 1):
        queries = slice(int(cu_seqlens_q[index]), int(cu_seqlens_q[index + 1]))
        keys = slice(int(cu_seqlens_k[index]), int(cu_seqlens_k[index + 1]))
        assert queries.stop - queries.start <= max_seqlen_q
        assert keys.stop - keys.start <= max_seqlen_k
        out = reference.softmax_attention(
            q[None, queries],
            k[None, keys],
            v[None, keys],
            scale=softmax_scale,
            window=None if window_size[0] == -1 else window_size[0] + 1,
            sequence=None,
        )
        outputs.append(out[0])
    return torch.cat(outputs)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = varlen  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(flash, "_DTYPES", (torch.float64,))


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("rows", [None, [[3, 8], [11]]], ids=["one document", "packed"])
def test_arguments_describe_documents_and_window(
    rows: list[list[int]] | None, window: int | None
) -> None:
    flash.require()
    operands = softmax_operands(2, 11, 11)
    sequence = None if rows is None else documents(rows)
    assert_results(
        softmax_results(flash.softmax_attention, operands, window=window, sequence=sequence),
        softmax_results(reference.softmax_attention, operands, window=window, sequence=sequence),
        relative=1e-13,
    )


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("window", [None, 4])
def test_arguments_describe_cached_keys(window: int | None) -> None:
    operands = softmax_operands(2, 3, 11)
    assert_results(
        softmax_results(flash.softmax_attention, operands, window=window, sequence=None),
        softmax_results(reference.softmax_attention, operands, window=window, sequence=None),
        relative=1e-13,
    )


def test_wide_inputs_go_to_the_blocked_kernel_and_say_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    operands = softmax_operands(1, 9, 9)
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        actual = softmax_results(flash.softmax_attention, operands, window=4, sequence=None)
    assert "no torch.float64 kernel" in caplog.text
    expected = softmax_results(reference.softmax_attention, operands, window=4, sequence=None)
    assert_results(actual, expected, relative=1e-13)
