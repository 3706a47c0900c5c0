from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.distillation import chunked_kl, hidden_mse
from tests.models.padded_vocabulary import PaddedVocabulary, padded
from tests.support.closeness import assert_close
from tests.support.operator_costs import CountProducts, PeakBytes

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _inputs(
    tokens: int, *, dim: int = 6, vocab: int = 11, dtype: torch.dtype = torch.float64
) -> Inputs:
    """Hidden and head of student and of a wider teacher, and labels; the first two are trained."""
    torch.manual_seed(1)
    hidden = torch.randn(tokens, dim, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, dim, dtype=dtype, requires_grad=True)
    teacher_hidden = torch.randn(tokens, 2 * dim, dtype=dtype)
    teacher_weight = torch.randn(vocab, 2 * dim, dtype=dtype)
    labels = torch.randint(0, vocab, (tokens,))
    labels[1::4] = -100
    return hidden, weight, teacher_hidden, teacher_weight, labels


def _dense(inputs: Inputs, temperature: float) -> Tensor:
    """The same sum by torch's own functions, all logits at once, in float64."""
    hidden, weight, teacher_hidden, teacher_weight, labels = (
        each.double() if each.is_floating_point() else each for each in inputs
    )
    student = F.log_softmax(hidden @ weight.T / temperature, dim=1)
    teacher = F.log_softmax(teacher_hidden @ teacher_weight.T / temperature, dim=1)
    counted = labels != -100
    divergence = F.kl_div(student[counted], teacher[counted], log_target=True, reduction="sum")
    return divergence * temperature**2


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [1, 4, 5, 13, 64])
def test_loss_and_gradients_are_those_of_kl_div(chunk: int, temperature: float) -> None:
    inputs = _inputs(13)
    loss = chunked_kl(*inputs, chunk_tokens=chunk, temperature=temperature)
    expected = _dense(inputs, temperature)
    assert_close(loss, expected, relative=1e-14)
    actual = torch.autograd.grad(loss * 0.37, inputs[:2])
    wanted = torch.autograd.grad(expected * 0.37, inputs[:2])
    for got, want in zip(actual, wanted, strict=True):
        assert_close(got, want, relative=1e-13)
    assert (actual[0][1::4] == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_padding_rows_do_not_exist_for_the_divergence(temperature: float) -> None:
    inputs = _inputs(13)
    hidden, weight, teacher_hidden, teacher_weight, labels = inputs
    vocabulary, wide = PaddedVocabulary(11), padded(weight, 5)
    loss = chunked_kl(
        hidden, wide, teacher_hidden, padded(teacher_weight, 3), labels,
        chunk_tokens=4, temperature=temperature, vocabulary=vocabulary,
    )  # fmt: skip
    expected = _dense(inputs, temperature)
    assert_close(loss, expected, relative=1e-14)
    d_hidden, d_weight = torch.autograd.grad(loss, [hidden, wide])
    wanted = torch.autograd.grad(expected, [hidden, weight])
    assert_close(d_hidden, wanted[0], relative=1e-13)
    assert_close(d_weight[:11], wanted[1], relative=1e-13)
    assert (d_weight[11:] == 0).all()
    assert vocabulary.num_reductions == 2


def test_a_student_equal_to_its_teacher_has_nothing_to_learn() -> None:
    hidden, weight, _, _, labels = _inputs(13, dtype=torch.float32)
    loss = chunked_kl(
        hidden, weight, hidden.detach(), weight.detach(), labels, chunk_tokens=5, temperature=2.0
    )
    assert float(loss.detach()) == 0.0
    for gradient in torch.autograd.grad(loss, [hidden, weight]):
        assert (gradient == 0).all()


def test_a_teacher_gets_no_gradient_and_masked_tokens_count_nothing() -> None:
    hidden, weight, teacher_hidden, teacher_weight, labels = _inputs(13)
    teacher_hidden.requires_grad_()
    teacher_weight.requires_grad_()
    labels[:] = -100
    loss = chunked_kl(
        hidden, weight, teacher_hidden, teacher_weight, labels, chunk_tokens=5, temperature=1.0
    )
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert hidden.grad is not None
    assert weight.grad is not None
    assert (hidden.grad == 0).all()
    assert (weight.grad == 0).all()
    assert teacher_hidden.grad is None
    assert teacher_weight.grad is None


def test_huge_logits_stay_finite() -> None:
    hidden, *others = _inputs(9)
    inputs = ((hidden * 300).detach().requires_grad_(), *others)
    loss = chunked_kl(*inputs, chunk_tokens=4, temperature=1.0)
    expected = _dense(inputs, 1.0)
    assert_close(loss, expected, relative=1e-14)
    wanted = torch.autograd.grad(expected, inputs[0])
    assert_close(torch.autograd.grad(loss, inputs[0])[0], wanted[0], relative=1e-12)


@pytest.mark.parametrize(
    ("student", "teacher", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-6),
        (torch.float32, torch.float64, 1e-6),
        (torch.float64, torch.float32, 1e-6),
        (torch.bfloat16, torch.bfloat16, 8e-3),
    ],
)
def test_dtypes_of_student_and_teacher_are_their_own(
    student: torch.dtype, teacher: torch.dtype, tolerance: float
) -> None:
    hidden, weight, *teachers, labels = _inputs(13)
    hidden, weight = (each.detach().to(student).requires_grad_() for each in (hidden, weight))
    inputs = (hidden, weight, *(each.to(teacher) for each in teachers), labels)
    loss = chunked_kl(*inputs, chunk_tokens=4, temperature=2.0)
    assert loss.dtype == torch.promote_types(student, torch.float32)
    expected = _dense(inputs, 2.0)
    assert_close(loss, expected, relative=tolerance)
    for got, want in zip(
        torch.autograd.grad(loss, inputs[:2]),
        torch.autograd.grad(expected, inputs[:2]),
        strict=True,
    ):
        assert got.dtype == student
        assert_close(got, want, relative=tolerance)


def test_inputs_of_the_divergence_are_not_changed() -> None:
    inputs = _inputs(9, dtype=torch.float32)
    before = [(each.detach().clone(), each._version) for each in inputs]
    chunked_kl(*inputs, chunk_tokens=4, temperature=1.0).backward()
    for now, (then, version) in zip(inputs, before, strict=True):
        assert torch.equal(now, then)
        assert now._version == version


def test_heads_of_different_vocabularies_are_refused() -> None:
    *inputs, labels = _inputs(9)
    inputs[3] = inputs[3][:7]
    with pytest.raises(RuntimeError, match="size of tensor"):
        chunked_kl(*inputs, labels, chunk_tokens=4, temperature=1.0)


@pytest.mark.parametrize(("frozen", "products"), [(None, 12), (0, 10), (1, 10)])
def test_a_frozen_input_costs_no_gradient(frozen: int | None, products: int) -> None:
    inputs = _inputs(8)
    if frozen is not None:
        inputs[frozen].requires_grad_(False)
    with CountProducts() as counted:
        chunked_kl(*inputs, chunk_tokens=4, temperature=1.0).backward()
    assert counted.count == products
    for index in (0, 1):
        assert (inputs[index].grad is None) == (index == frozen)


def test_a_second_derivative_of_the_divergence_is_refused_not_wrong() -> None:
    inputs = _inputs(9)
    loss = chunked_kl(*inputs, chunk_tokens=4, temperature=1.0)
    (first,) = torch.autograd.grad(loss.square(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_peak_memory_of_the_divergence_does_not_grow_with_tokens() -> None:
    dim, vocab, chunk = 4, 512, 32
    peaks = []
    for tokens in (128, 1024):
        inputs = _inputs(tokens, dim=dim, vocab=vocab, dtype=torch.float32)
        kept: list[int] = []
        with (
            PeakBytes() as memory,
            torch.autograd.graph.saved_tensors_hooks(
                lambda saved, kept=kept: kept.append(saved.numel()) or saved, lambda saved: saved
            ),
        ):
            chunked_kl(*inputs, chunk_tokens=chunk, temperature=2.0).backward()
        assert sorted(kept) == sorted([2 * tokens, *(each.numel() for each in inputs[:4])])
        assert memory.largest <= chunk * vocab * 4
        peaks.append(memory.peak - tokens * (2 * dim + 12) * 4)
    one_chunk = chunk * vocab * 4
    assert peaks[1] <= peaks[0] + one_chunk // 4
    assert peaks[0] <= 6 * one_chunk


def test_hidden_mse_sums_over_tokens_and_averages_over_channels() -> None:
    torch.manual_seed(2)
    student = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 9, (2, 5))
    labels[0, 3:] = -100
    loss = hidden_mse(student, teacher, labels)
    counted = [(row, token) for row in range(2) for token in range(5) if labels[row, token] >= 0]
    assert len(counted) == 8
    expected = sum(
        (F.mse_loss(student[place], teacher.detach()[place]) for place in counted),
        start=torch.zeros((), dtype=torch.float64),
    )
    assert_close(loss, expected, relative=1e-14)
    (actual,) = torch.autograd.grad(loss, student, retain_graph=True)
    assert_close(actual, torch.autograd.grad(expected, student)[0], relative=1e-14)
    loss.backward()
    assert teacher.grad is None


def test_hidden_mse_never_looks_at_masked_tokens() -> None:
    labels = torch.tensor([[3, -100]])
    student = torch.ones(1, 2, 4).requires_grad_()
    teacher = torch.zeros(1, 2, 4)
    teacher[0, 1] = float("nan")
    loss = hidden_mse(student, teacher, labels)
    loss.backward()
    assert float(loss.detach()) == 1.0
    assert student.grad is not None
    assert torch.equal(student.grad, torch.tensor([[[0.5] * 4, [0.0] * 4]]))


def test_hidden_mse_of_bf16_is_computed_in_float32() -> None:
    torch.manual_seed(3)
    student = torch.randn(1, 700, 8).bfloat16().requires_grad_()
    teacher = torch.randn(1, 700, 8)
    loss = hidden_mse(student, teacher.bfloat16(), torch.zeros(1, 700, dtype=torch.long))
    exact = (student.detach().double() - teacher.bfloat16().double()).square().mean(-1).sum()
    assert loss.dtype == torch.float32
    assert_close(loss, exact, relative=1e-6)
    loss.backward()
    assert student.grad is not None
    assert student.grad.dtype == torch.bfloat16
