"""What the flash-attn kernel is handed, by a stand-in that computes it from those arguments."""

from __future__ import annotations

import logging
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from models import reference
from models.kernels import flash, flash_sinks
from models.kernels.fallback import warn_once
from tests.models.kernels.cases import (
    assert_results,
    documents,
    poisoned_allocations,
    sink_operands,
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


def _scores(
    q: Tensor, k: Tensor, bounds: tuple[Tensor, Tensor], scale: float, causal: bool, left: int
) -> Tensor:
    """Scores `[N, total q, total k]`, -inf where a query does not see a key."""
    scores = q.new_full((q.shape[1], len(q), len(k)), float("-inf"))
    for index in range(len(bounds[0]) - 1):
        (start, stop), (first, last) = (x[index : index + 2].tolist() for x in bounds)
        group = q.shape[1] // k.shape[1]
        keys = k[first:last].repeat_interleave(group, dim=1)
        part = scale * torch.einsum("qnh,knh->nqk", q[start:stop], keys)
        distance = torch.arange(stop - start)[:, None] + (last - first) - (stop - start)
        distance = distance - torch.arange(last - first)[None, :]
        hidden = (distance < 0) if causal else torch.zeros_like(distance, dtype=torch.bool)
        if left >= 0:
            hidden = hidden | (distance > left)
        scores[:, start:stop, first:last] = part.masked_fill(hidden, float("-inf"))
    return scores


def varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """flash-attn 2.8's function below autograd: output and log-sum-exp `[N, total q]`."""
    assert dropout_p == softcap == 0.0
    assert alibi_slopes is block_table is leftpad_k is seqused_k is None
    assert not return_softmax
    assert not zero_tensors
    assert q.shape[-1] % 8 == 0
    assert cu_seqlens_q.dtype is cu_seqlens_k.dtype is torch.int32
    assert int(cu_seqlens_q.diff().max()) <= max_seqlen_q
    assert int(cu_seqlens_k.diff().max()) <= max_seqlen_k
    assert window_size_right == (-1 if window_size_left == -1 else 0)
    bounds = (cu_seqlens_q, cu_seqlens_k)
    scores = _scores(q, k, bounds, softmax_scale, causal, window_size_left)
    values = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    out = torch.einsum("nqk,knh->qnh", scores.softmax(-1), values)
    return out, scores.logsumexp(-1), q.new_empty(0), q.new_empty(0)


def varlen_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """flash-attn 2.8's backward: probabilities from the given sums, delta from the given output."""
    assert dropout_p == softcap == 0.0
    assert alibi_slopes is rng_state is None
    assert not deterministic
    assert not zero_tensors
    assert window_size_right == (-1 if window_size_left == -1 else 0)
    assert max_seqlen_q > 0
    assert max_seqlen_k > 0
    # The kernel reads this one by fixed strides.
    assert softmax_lse.shape == (q.shape[1], len(q))
    assert softmax_lse.is_contiguous()
    bounds, groups = (cu_seqlens_q, cu_seqlens_k), (k.shape[1], -1)
    scores = _scores(q, k, bounds, softmax_scale, causal, window_size_left)
    weights = (scores - softmax_lse[..., None]).exp()
    keys, values = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    delta = (grad_out * out).sum(-1).T[..., None]
    grad = softmax_scale * weights * (torch.einsum("qnh,knh->nqk", grad_out, values) - delta)
    dq.copy_(torch.einsum("nqk,knh->qnh", grad, keys))
    dk.copy_(torch.einsum("nqk,qnh->knh", grad, q).unflatten(1, groups).sum(2))
    dv.copy_(torch.einsum("nqk,qnh->knh", weights, grad_out).unflatten(1, groups).sum(2))
    return delta


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    module, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    module.flash_attn_varlen_func = varlen  # type: ignore[attr-defined]
    interface._flash_attn_varlen_forward = varlen_forward  # type: ignore[attr-defined]
    interface._flash_attn_varlen_backward = varlen_backward  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
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


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("dim", [8, 12], ids=["whole groups", "padded channels"])
@pytest.mark.parametrize("own_queries", [False, True], ids=["q", "own q"])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize(
    ("queries", "rows"),
    [(11, None), (11, [[3, 8], [11]]), (3, None), (1, None)],
    ids=["one document", "packed", "cached keys", "decode"],
)
def test_sinks_are_merged_forward_and_backward(
    queries: int,
    rows: list[list[int]] | None,
    window: int | None,
    own_queries: bool,
    dim: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Three copies of the sinks, the last one for fewer queries.
    monkeypatch.setattr(flash_sinks, "QUERIES_A_COPY", 9)
    operands = softmax_operands(2, queries, 11, dim=dim)
    operands += sink_operands(operands, 5, own_queries=own_queries)
    sequence = None if rows is None else documents(rows)
    with poisoned_allocations():
        actual = softmax_results(
            flash.softmax_attention, operands, window=window, sequence=sequence
        )
    assert_results(
        actual,
        softmax_results(reference.softmax_attention, operands, window=window, sequence=sequence),
        relative=1e-12,
    )


def test_wide_inputs_go_to_the_blocked_kernel_and_say_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    operands = softmax_operands(1, 9, 9)
    operands += sink_operands(operands, 2, own_queries=False)
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        actual = softmax_results(flash.softmax_attention, operands, window=4, sequence=None)
    assert "no torch.float64 kernel" in caplog.text
    expected = softmax_results(reference.softmax_attention, operands, window=4, sequence=None)
    assert_results(actual, expected, relative=1e-13)
