"""The chunked kernel against the recurrence, finite differences, and itself in pieces."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models import reference
from models.kernels import chunked, tiling
from models.sequence import SequenceContext
from tests.models.kernels.cases import (
    assert_results,
    document_state,
    documents,
    double,
    linear_operands,
    linear_results,
    poisoned_allocations,
    recurrence,
    worst,
)
from tests.support.closeness import assert_close, relative_error

DOCUMENTS = {
    "one": None,
    "at chunk starts": [[32, 64, 5], [96, 1, 4], [101]],
    "inside chunks": [[1, 1, 40, 2, 57], [99, 2], [31, 2, 1, 67]],
}


@pytest.mark.parametrize("tile_elements", [1 << 19, 1], ids=["one tile", "a tile a chunk"])
@pytest.mark.parametrize("with_state", [True, False], ids=["initial state", "no state"])
@pytest.mark.parametrize("rows", DOCUMENTS.values(), ids=DOCUMENTS.keys())
def test_chunks_are_the_recurrence_with_documents_and_states(
    rows: list[list[int]] | None,
    with_state: bool,
    tile_elements: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiling, "_TILE_ELEMENTS", tile_elements)
    operands = linear_operands(3, 101)
    sequence = None if rows is None else documents(rows)
    with poisoned_allocations():
        actual = linear_results(chunked.linear_attention, operands, sequence, with_state=with_state)
    assert_results(actual, recurrence(operands, sequence, with_state=with_state), relative=1e-13)


@pytest.mark.parametrize("tile_elements", [1 << 19, 1], ids=["one tile", "a tile a chunk"])
@pytest.mark.parametrize("with_state", [True, False], ids=["initial state", "no state"])
@pytest.mark.parametrize("rows", DOCUMENTS.values(), ids=DOCUMENTS.keys())
def test_every_document_starts_from_the_given_state(
    rows: list[list[int]] | None,
    with_state: bool,
    tile_elements: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiling, "_TILE_ELEMENTS", tile_elements)
    operands = linear_operands(3, 101)
    operands.append(document_state(operands))
    if rows is None and with_state:
        # Every row goes on with its own state: no document starts.
        operands.pop()
    sequence = None if rows is None else documents(rows)
    with poisoned_allocations():
        actual = linear_results(chunked.linear_attention, operands, sequence, with_state=with_state)
    assert_results(actual, recurrence(operands, sequence, with_state=with_state), relative=1e-13)


def test_a_packed_row_is_its_documents_one_by_one() -> None:
    operands = linear_operands(1, 101)
    start, lengths = document_state(operands), [1, 40, 2, 58]
    q, k, v, log_decay = (x.requires_grad_() for x in operands[:4])
    leaves = [q, k, v, log_decay, start.requires_grad_()]
    whole, final = chunked.linear_attention(
        q, k, v, log_decay, scale=0.3, sequence=documents([lengths]), document_state=start,
        output_final_state=True,
    )  # fmt: skip
    outputs, ending = [], None
    for part in zip(*(x.split(lengths, dim=1) for x in leaves[:4]), strict=True):
        out, ending = chunked.linear_attention(
            *part, scale=0.3, sequence=None, initial_state=start[None], output_final_state=True
        )
        outputs.append(out)
    assert final is not None
    assert ending is not None
    separate = torch.cat(outputs, dim=1)
    assert_close(whole, separate, relative=1e-13)
    assert_close(final, ending, relative=1e-13)
    grads = [torch.autograd.grad(x.square().sum(), leaves) for x in (whole, separate)]
    for actual, expected in zip(*grads, strict=True):
        assert_close(actual, expected, relative=1e-12)


@pytest.mark.parametrize("decays", ["mild", "strong", "zero"])
def test_states_of_documents_keep_float32_precision(decays: str) -> None:
    operands = linear_operands(2, 200, dtype=torch.float32, strong=decays == "strong")
    operands.append(document_state(operands))
    if decays == "zero":
        operands[3][:, [0, 5, 31, 32, 77, 78, 199]] = -math.inf
    sequence = documents([[77, 123], [5, 27, 1, 167]])
    actual = linear_results(chunked.linear_attention, operands, sequence)
    assert_results(actual, recurrence(operands, sequence), relative=1e-6)


def test_a_decoder_passes_both_states() -> None:
    """What it carries, none at first, and what documents start from."""
    operands = linear_operands(2, 20)
    start, state, outputs = document_state(operands), None, []
    for part in (slice(0, 1), slice(1, 15), *(slice(step, step + 1) for step in range(15, 20))):
        out, state = chunked.linear_attention(
            *(x[:, part] for x in operands[:4]), scale=0.3, sequence=None, initial_state=state,
            document_state=start, output_final_state=True,
        )  # fmt: skip
        outputs.append(out)
    whole, final = reference.linear_attention(
        *operands[:4], scale=0.3, sequence=None, document_state=start, output_final_state=True
    )
    assert final is not None
    assert_close(torch.cat(outputs, dim=1), whole, relative=1e-13)
    assert_close(state, final, relative=1e-13)


@pytest.mark.parametrize("tokens", [1, 2, 3, 16, 31, 32, 33, 63, 65])
def test_chunks_are_the_recurrence_at_any_length(tokens: int) -> None:
    operands = linear_operands(2, tokens, heads=6, groups=2, dim=4)
    with poisoned_allocations():
        actual = linear_results(chunked.linear_attention, operands, None)
    assert_results(actual, recurrence(operands, None), relative=1e-13)


def test_gradients_are_finite_differences() -> None:
    operands = linear_operands(1, 5, heads=2, groups=1, dim=2)
    leaves = [x.requires_grad_() for x in [*operands, document_state(operands)]]
    sequence = documents([[3, 2]])

    def results(*inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        return chunked.linear_attention(
            *inputs[:4],
            scale=0.3,
            sequence=sequence,
            initial_state=inputs[4],
            document_state=inputs[5],
            output_final_state=True,
        )

    assert torch.autograd.gradcheck(results, leaves)


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
def test_strong_decays_keep_float32_precision(packed: bool) -> None:
    """Traps 4: keys tied to gates with logits of spread 20 decay by e^-800 in one chunk of 100."""
    operands = linear_operands(2, 200, dtype=torch.float32, strong=True)
    sequence = documents([[77, 123], [200]]) if packed else None
    assert float(operands[3][:, :100].sum(1).min()) < -700
    actual = linear_results(chunked.linear_attention, operands, sequence)
    # The rule is 1e-5; sums that are never subtracted leave the rounding of float32 alone.
    assert_results(actual, recurrence(operands, sequence), relative=1e-6)


def test_a_decay_of_zero_forgets_without_nan() -> None:
    operands = linear_operands(1, 70)
    for step in (0, 5, 32, 33, 69):
        operands[3][:, step] = -math.inf
    actual = linear_results(chunked.linear_attention, operands, None)
    assert_results(actual, recurrence(operands, None), relative=1e-13)


def test_half_precision_inputs_keep_the_state_and_the_gate_in_float32() -> None:
    """Traps 7: gate gradients summed over chunks only; globally from bf16 dq, dk they lose 3 %."""
    operands = linear_operands(1, 1500, dtype=torch.bfloat16)
    actual = linear_results(chunked.linear_attention, operands, None)
    expected = linear_results(chunked.linear_attention, double(operands), None)
    assert actual["out"].dtype is torch.bfloat16
    assert actual["final_state"].dtype is torch.float32
    assert actual["grad log_decay"].dtype is torch.float32
    errors = worst(actual, expected)
    assert errors["final_state"] <= 1e-6, errors
    # What is left is the rounding of bf16 results: the output, and the gradient that enters it.
    assert max(errors.values()) <= 2**-7, errors
    assert errors["grad log_decay"] <= 2e-3, errors


@pytest.mark.parametrize("cut", [1, 31, 32, 50])
def test_a_row_in_two_calls_is_the_row_in_one(cut: int) -> None:
    q, k, v, log_decay, state = linear_operands(2, 90)
    whole, final = reference.linear_attention(
        q, k, v, log_decay, scale=0.3, sequence=None, initial_state=state, output_final_state=True
    )
    outputs = []
    for part in (slice(0, cut), slice(cut, 90)):
        inputs = [x[:, part] for x in (q, k, v, log_decay)]
        out, carried = chunked.linear_attention(
            *inputs, scale=0.3, sequence=None, initial_state=state, output_final_state=True
        )
        assert carried is not None
        state = carried
        outputs.append(out)
    assert final is not None
    assert_close(torch.cat(outputs, dim=1), whole, relative=1e-13)
    assert_close(state, final, relative=1e-13)


def test_one_token_is_one_step_of_the_recurrence(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("a single token must not go through the chunked algebra")

    monkeypatch.setattr(chunked._ChunkedLinearAttention, "apply", forbidden)
    operands = linear_operands(3, 1)
    actual = linear_results(chunked.linear_attention, operands, documents([[1], [1], [1]]))
    assert_results(actual, recurrence(operands, None), relative=1e-14)


def test_the_final_state_alone_can_be_trained_through() -> None:
    leaves = [x.requires_grad_() for x in linear_operands(2, 40)]
    finals = [
        kernel.linear_attention(
            *leaves[:4], scale=0.3, sequence=None, initial_state=leaves[4], output_final_state=True
        )[1]
        for kernel in (chunked, reference)
    ]
    grads = [torch.autograd.grad(f.square().sum(), leaves[1:]) for f in finals if f is not None]
    for actual, expected in zip(*grads, strict=True):
        assert_close(actual, expected, relative=1e-13)


def test_no_final_state_unless_asked() -> None:
    operands = linear_operands(1, 3)
    out, final = chunked.linear_attention(*operands[:4], scale=1.0, sequence=None)
    assert final is None
    assert out.shape == (1, 3, 4, 8)


def test_backward_keeps_the_inputs_and_a_state_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "_TILE_ELEMENTS", 4 * 32 * 8 * 4)
    q, k, v, log_decay, _ = (x.requires_grad_() for x in linear_operands(1, 1024))
    saved: list[int] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        chunked.linear_attention(q, k, v, log_decay, scale=1.0, sequence=None)
    inputs = sum(x.numel() for x in (q, k, v, log_decay))
    states = 1024 // 128 * 2 * 8 * 8
    assert sum(saved) == inputs + states


def test_the_rows_of_a_large_batch_are_cut_into_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "_TILE_ELEMENTS", 2 * 32 * 4 * 8)
    operands = linear_operands(5, 70)
    sequence = documents([[70], [20, 50], [33, 37], [70], [1, 69]])
    with poisoned_allocations():
        actual = linear_results(chunked.linear_attention, operands, sequence)
    assert_results(actual, recurrence(operands, sequence), relative=1e-13)


def test_gradients_reach_operands_that_are_views() -> None:
    """Heads come as transposed views, gradients as expanded ones."""
    operands = linear_operands(2, 40)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in operands[:4]]
    leaves = [x.detach().requires_grad_() for x in views]
    out, _ = chunked.linear_attention(*leaves, scale=0.3, sequence=None)
    actual = torch.autograd.grad(out.sum(), leaves)
    slow, _ = reference.linear_attention(*leaves, scale=0.3, sequence=None)
    for left, right in zip(actual, torch.autograd.grad(slow.sum(), leaves), strict=True):
        assert relative_error(left, right) <= 1e-13


def test_heads_must_be_whole_groups() -> None:
    q, k, v, log_decay, _ = linear_operands(1, 4)
    with pytest.raises(ValueError, match=r"q heads \(3\) must be a multiple of k heads: got 2"):
        chunked.linear_attention(q[:, :, :3], k, v, log_decay, scale=1.0, sequence=None)


def test_the_sequence_must_describe_the_batch() -> None:
    q, k, v, log_decay, _ = linear_operands(1, 4)
    wrong = SequenceContext.one_document_per_row(1, 5)
    with pytest.raises(ValueError, match=r"sequence \(\(1, 5\)\) must have q's rows and tokens"):
        chunked.linear_attention(q, k, v, log_decay, scale=1.0, sequence=wrong)
