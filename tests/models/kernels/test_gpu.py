"""GPU kernels against the float64 definitions: precisions, odd lengths, boundaries, states."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from models import reference
from models.kernels import blocked, chunked, fla, flash, flex
from models.sequence import SequenceContext
from tests.models.kernels.cases import (
    assert_results,
    document_state,
    documents,
    double,
    linear_operands,
    linear_results,
    sink_operands,
    softmax_operands,
    softmax_results,
    worst,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one CUDA device"),
]

DEVICE = torch.device("cuda")
DOCUMENTS = {"one document": None, "packed": [[1, 300, 64, 6], [371], [128, 243]]}
# Largest error over the largest value; tf32 products are allowed in float32, bf16 has 8 bits.
TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 2e-2}


def on_device(sequence: SequenceContext | None) -> SequenceContext | None:
    return (
        None
        if sequence is None
        else SequenceContext.from_document_ids(sequence.document_ids.to(DEVICE))
    )


def installed(library: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(library) is None, reason=f"needs {library}")


@installed("fla")
@pytest.mark.parametrize("rows", DOCUMENTS.values(), ids=DOCUMENTS.keys())
@pytest.mark.parametrize("strong", [False, True], ids=["mild decays", "strong decays"])
@pytest.mark.parametrize("with_state", [True, False], ids=["initial state", "no state"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_fla_is_the_recurrence(
    dtype: torch.dtype, with_state: bool, strong: bool, rows: list[list[int]] | None
) -> None:
    operands = linear_operands(3, 371, dim=64, dtype=dtype, strong=strong)
    sequence = None if rows is None else documents(rows)
    # The chunked form in float64 equals the recurrence to 1e-13 and is fast enough at this length.
    expected = linear_results(
        chunked.linear_attention, double(operands), sequence, with_state=with_state
    )
    moved = [x.to(DEVICE) for x in operands]
    actual = linear_results(fla.linear_attention, moved, on_device(sequence), with_state=with_state)
    assert_results(actual, expected, relative=TOLERANCE[dtype])


@installed("fla")
@pytest.mark.parametrize("with_state", [True, False], ids=["initial state", "no state"])
def test_fla_starts_documents_from_a_given_state(with_state: bool) -> None:
    operands = linear_operands(3, 371, dim=64, dtype=torch.bfloat16)
    operands.append(document_state(operands))
    sequence = documents([[1, 300, 64, 6], [371], [128, 243]])
    expected = linear_results(
        chunked.linear_attention, double(operands), sequence, with_state=with_state
    )
    moved = [x.to(DEVICE) for x in operands]
    actual = linear_results(fla.linear_attention, moved, on_device(sequence), with_state=with_state)
    assert_results(actual, expected, relative=TOLERANCE[torch.bfloat16])


@installed("fla")
@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 63, 64, 65, 255])
def test_fla_takes_any_length(tokens: int) -> None:
    operands = linear_operands(2, tokens, dim=128, heads=7, groups=1, dtype=torch.bfloat16)
    expected = linear_results(chunked.linear_attention, double(operands), None)
    actual = linear_results(fla.linear_attention, [x.to(DEVICE) for x in operands], None)
    assert_results(actual, expected, relative=TOLERANCE[torch.bfloat16])


@installed("fla")
def test_fla_gate_gradients_do_not_drift_with_length() -> None:
    """Traps 7: the global identity loses 3 % at 4k tokens and 16 % at 64k in bf16."""
    operands = linear_operands(1, 16_384, heads=2, groups=1, dim=64, dtype=torch.bfloat16)
    expected = linear_results(chunked.linear_attention, double(operands), None)
    actual = linear_results(fla.linear_attention, [x.to(DEVICE) for x in operands], None)
    assert worst(actual, expected)["grad log_decay"] <= TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("rows", DOCUMENTS.values(), ids=DOCUMENTS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_chunked_kernel_runs_on_the_device(
    dtype: torch.dtype, rows: list[list[int]] | None
) -> None:
    operands = linear_operands(3, 371, dim=16, dtype=dtype)
    sequence = None if rows is None else documents(rows)
    expected = linear_results(chunked.linear_attention, double(operands), sequence)
    moved = [x.to(DEVICE) for x in operands]
    actual = linear_results(chunked.linear_attention, moved, on_device(sequence))
    relative = 1e-12 if dtype is torch.float64 else TOLERANCE[torch.float32]
    assert_results(actual, expected, relative=relative)


SOFTMAX = [
    pytest.param(
        flash.softmax_attention, torch.bfloat16, marks=installed("flash_attn"), id="flash"
    ),
    pytest.param(flex.softmax_attention, torch.bfloat16, id="flex bf16"),
    pytest.param(flex.softmax_attention, torch.float32, id="flex fp32"),
]


@pytest.mark.parametrize(("kernel", "dtype"), SOFTMAX)
@pytest.mark.parametrize("window", [None, 1, 100, 371])
@pytest.mark.parametrize("rows", DOCUMENTS.values(), ids=DOCUMENTS.keys())
def test_softmax_kernels_are_the_dense_mask(
    rows: list[list[int]] | None, window: int | None, kernel: object, dtype: torch.dtype
) -> None:
    operands = softmax_operands(3, 371, 371, dim=64, dtype=dtype)
    sequence = None if rows is None else documents(rows)
    expected = softmax_results(
        reference.softmax_attention, double(operands), window=window, sequence=sequence
    )
    actual = softmax_results(
        kernel,  # type: ignore[arg-type]
        [x.to(DEVICE) for x in operands],
        window=window,
        sequence=on_device(sequence),
    )
    for name, error in worst(actual, expected).items():
        # A window of one key has a zero gradient for q and k: only rounding is left of it.
        assert error <= TOLERANCE[dtype] or (window == 1 and name in ("grad q", "grad k")), name


SINKS = [
    *SOFTMAX,
    pytest.param(blocked.softmax_attention, torch.float32, id="blocked fp32"),
    pytest.param(blocked.softmax_attention, torch.float64, id="blocked fp64"),
]


@pytest.mark.parametrize(("kernel", "dtype"), SINKS)
@pytest.mark.parametrize("own_queries", [False, True], ids=["q", "own q"])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("rows", DOCUMENTS.values(), ids=DOCUMENTS.keys())
def test_softmax_kernels_see_sinks(
    rows: list[list[int]] | None,
    window: int | None,
    own_queries: bool,
    kernel: object,
    dtype: torch.dtype,
) -> None:
    operands = softmax_operands(3, 371, 371, dim=64, dtype=dtype)
    operands += sink_operands(operands, 128, own_queries=own_queries)
    sequence = None if rows is None else documents(rows)
    expected = softmax_results(
        reference.softmax_attention, double(operands), window=window, sequence=sequence
    )
    actual = softmax_results(
        kernel,  # type: ignore[arg-type]
        [x.to(DEVICE) for x in operands],
        window=window,
        sequence=on_device(sequence),
    )
    assert_results(actual, expected, relative=TOLERANCE.get(dtype, 1e-12))


@pytest.mark.parametrize(("kernel", "dtype"), SOFTMAX)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("queries", [1, 70])
def test_softmax_kernels_continue_a_cache(
    queries: int, window: int | None, kernel: object, dtype: torch.dtype
) -> None:
    operands = softmax_operands(2, queries, 371, dim=64, dtype=dtype)
    expected = softmax_results(
        reference.softmax_attention, double(operands), window=window, sequence=None
    )
    actual = softmax_results(
        kernel,  # type: ignore[arg-type]
        [x.to(DEVICE) for x in operands],
        window=window,
        sequence=None,
    )
    assert_results(actual, expected, relative=TOLERANCE[dtype])
