from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models.loss import chunked_cross_entropy, chunked_token_losses, logits_of
from tests.models.padded_vocabulary import PaddedVocabulary, padded
from tests.support.closeness import assert_close
from tests.support.operator_costs import CountProducts, PeakBytes


def _inputs(
    tokens: int, *, dim: int = 6, vocab: int = 11, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    hidden = torch.randn(tokens, dim, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, dim, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, vocab, (tokens,))
    labels[1::4] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("chunk", [1, 4, 5, 13, 64])
def test_loss_and_gradients_are_those_of_cross_entropy(chunk: int) -> None:
    hidden, weight, labels = _inputs(13)
    loss = chunked_cross_entropy(hidden, weight, labels, chunk_tokens=chunk)
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    assert_close(loss, expected, relative=1e-14)
    actual = torch.autograd.grad(loss * 0.37, [hidden, weight])
    wanted = torch.autograd.grad(expected * 0.37, [hidden, weight])
    for got, want in zip(actual, wanted, strict=True):
        assert_close(got, want, relative=1e-13)


def test_token_losses_are_those_of_cross_entropy_and_0_where_masked() -> None:
    hidden, weight, labels = _inputs(13)
    losses = chunked_token_losses(hidden, weight, labels, chunk_tokens=5)
    assert_close(
        losses, F.cross_entropy(hidden @ weight.T, labels, reduction="none"), relative=1e-14
    )
    assert (losses[1::4] == 0).all()
    assert not losses.requires_grad


def test_masked_tokens_have_no_gradient_at_all() -> None:
    hidden, weight, labels = _inputs(13)
    chunked_cross_entropy(hidden, weight, labels, chunk_tokens=5).backward()
    assert hidden.grad is not None
    assert (hidden.grad[1::4] == 0).all()
    all_masked = chunked_cross_entropy(
        hidden, weight, torch.full_like(labels, -100), chunk_tokens=5
    )
    assert float(all_masked.detach()) == 0.0


def test_huge_logits_stay_finite() -> None:
    hidden, weight, labels = _inputs(9)
    hidden, weight = (hidden * 300).detach().requires_grad_(), weight.detach()
    loss = chunked_cross_entropy(hidden, weight, labels, chunk_tokens=4)
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    assert_close(loss, expected, relative=1e-14)
    (actual,) = torch.autograd.grad(loss, hidden)
    (wanted,) = torch.autograd.grad(expected, hidden)
    assert_close(actual, wanted, relative=1e-12)


@pytest.mark.parametrize("vocabulary", [None, PaddedVocabulary(8)], ids=["whole", "padded"])
def test_inputs_are_not_changed(vocabulary: PaddedVocabulary | None) -> None:
    hidden, weight, labels = _inputs(9, vocab=11 if vocabulary is None else 8, dtype=torch.float32)
    weight = weight if vocabulary is None else padded(weight, 3)
    inputs = hidden, weight, labels
    before = [(each.detach().clone(), each._version) for each in inputs]
    chunked_cross_entropy(*inputs, chunk_tokens=4, z_loss=0.1, vocabulary=vocabulary).backward()
    chunked_token_losses(*inputs, chunk_tokens=4, vocabulary=vocabulary)
    for now, (then, version) in zip(inputs, before, strict=True):
        assert torch.equal(now.nan_to_num(7.0), then.nan_to_num(7.0))
        assert now._version == version


def test_a_second_derivative_is_refused_not_wrong() -> None:
    hidden, weight, labels = _inputs(9)
    loss = chunked_cross_entropy(hidden, weight, labels, chunk_tokens=4)
    (first,) = torch.autograd.grad(loss.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize(("frozen", "products"), [(None, 8), (0, 6), (1, 6)])
def test_a_frozen_input_costs_no_gradient(frozen: int | None, products: int) -> None:
    inputs = _inputs(8)
    if frozen is not None:
        inputs[frozen].requires_grad_(False)
    with CountProducts() as counted:
        chunked_cross_entropy(*inputs, chunk_tokens=4).backward()
    assert counted.count == products
    for index in (0, 1):
        assert (inputs[index].grad is None) == (index == frozen)


def test_bf16_weight_gradients_accumulate_in_float32_over_chunks() -> None:
    # 64 chunks: a bf16 sum would stall at about 2^-8 relative to the largest partial sum.
    tokens = 512
    hidden, weight, labels = _inputs(tokens, dim=16, dtype=torch.bfloat16)
    loss = chunked_cross_entropy(hidden, weight, labels, chunk_tokens=8)
    assert loss.dtype == torch.float32
    loss.backward()
    exact_hidden = hidden.detach().double().requires_grad_()
    exact_weight = weight.detach().double().requires_grad_()
    exact = F.cross_entropy(exact_hidden @ exact_weight.T, labels, reduction="sum")
    exact.backward()
    assert_close(loss, exact, relative=2e-3)
    assert weight.grad is not None
    assert exact_weight.grad is not None
    assert weight.grad.dtype == torch.bfloat16
    assert_close(weight.grad, exact_weight.grad, relative=6e-3)


def test_peak_memory_of_the_loss_does_not_grow_with_tokens() -> None:
    dim, vocab, chunk = 4, 512, 32
    peaks, largest = [], []
    for tokens in (128, 1024):
        hidden, weight, labels = _inputs(tokens, dim=dim, vocab=vocab, dtype=torch.float32)
        with PeakBytes() as memory:
            chunked_cross_entropy(hidden, weight, labels, chunk_tokens=chunk).backward()
        per_token = tokens * (2 * dim + 8) * 4
        peaks.append(memory.peak - per_token)
        largest.append(memory.largest)
    one_chunk = chunk * vocab * 4
    assert max(largest) <= one_chunk
    # What is left after the token-sized vectors (d_hidden, losses, labels) is a few chunks.
    assert peaks[1] <= peaks[0] + one_chunk // 4
    assert peaks[0] <= 5 * one_chunk


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("chunk", [1, 5, 13, 64])
def test_padding_rows_do_not_exist_for_the_loss(chunk: int, z_loss: float) -> None:
    hidden, weight, labels = _inputs(13)
    vocabulary, wide = PaddedVocabulary(weight.shape[0]), padded(weight, 5)
    losses = chunked_token_losses(hidden, wide, labels, chunk_tokens=chunk, vocabulary=vocabulary)
    loss = chunked_cross_entropy(
        hidden, wide, labels, chunk_tokens=chunk, vocabulary=vocabulary, z_loss=z_loss
    )
    logits = hidden @ weight.T
    expected = F.cross_entropy(logits, labels, reduction="none")
    assert_close(losses, expected, relative=1e-14)
    squares = logits.logsumexp(1).square()[labels != -100].sum()
    expected = expected.sum() + z_loss * squares
    assert_close(loss, expected, relative=1e-14)
    d_hidden, d_weight = torch.autograd.grad(loss * 0.37, [hidden, wide])
    wanted = torch.autograd.grad(expected * 0.37, [hidden, weight])
    assert_close(d_hidden, wanted[0], relative=1e-13)
    assert_close(d_weight[: weight.shape[0]], wanted[1], relative=1e-13)
    assert (d_weight[weight.shape[0] :] == 0).all()


def test_logits_of_padding_rows_are_minus_infinity() -> None:
    hidden, weight, _ = _inputs(6)
    hidden = hidden.detach().view(2, 3, 6)
    logits = logits_of(hidden, padded(weight, 5), PaddedVocabulary(11))
    assert_close(logits[..., :11], logits_of(hidden, weight), relative=1e-15)
    assert (logits[..., 11:] == float("-inf")).all()


def test_z_loss_of_a_whole_vocabulary_counts_unmasked_tokens_only() -> None:
    hidden, weight, labels = _inputs(13)
    loss = chunked_cross_entropy(hidden, weight, labels, chunk_tokens=4, z_loss=0.3)
    logits = (hidden @ weight.T)[labels != -100]
    expected = F.cross_entropy(logits, labels[labels != -100], reduction="sum")
    expected = expected + 0.3 * logits.logsumexp(1).square().sum()
    assert_close(loss, expected, relative=1e-14)
    actual = torch.autograd.grad(loss * 0.37, [hidden, weight])
    for got, want in zip(
        actual, torch.autograd.grad(expected * 0.37, [hidden, weight]), strict=True
    ):
        assert_close(got, want, relative=1e-13)
    assert (actual[0][labels == -100] == 0).all()


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_a_cut_vocabulary_costs_two_reductions_however_many_chunks(chunk: int) -> None:
    vocabulary = PaddedVocabulary(11)
    chunked_cross_entropy(*_inputs(13), chunk_tokens=chunk, vocabulary=vocabulary).backward()
    assert vocabulary.num_reductions == 2


def test_a_label_that_no_row_has_is_never_another_row() -> None:
    hidden, weight, labels = _inputs(13)
    for label, vocabulary in ((-7, None), (-7, PaddedVocabulary(11)), (11, PaddedVocabulary(11))):
        labels[4] = label
        losses = chunked_token_losses(
            hidden, padded(weight, 0 if vocabulary is None else 5), labels,
            chunk_tokens=5, vocabulary=vocabulary,
        )  # fmt: skip
        assert losses.isinf().nonzero().tolist() == [[4]]
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        chunked_token_losses(hidden, weight, labels, chunk_tokens=5)


@pytest.mark.parametrize("vocabulary", [None, PaddedVocabulary(500)], ids=["whole", "padded"])
def test_nothing_as_large_as_all_logits_is_kept_for_backward(
    vocabulary: PaddedVocabulary | None,
) -> None:
    hidden, weight, labels = _inputs(256, dim=4, vocab=512)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda saved: kept.append(saved.numel()) or saved, lambda saved: saved
    ):
        chunked_cross_entropy(
            hidden, weight, labels % 500, chunk_tokens=32, vocabulary=vocabulary, z_loss=0.1
        )
    assert sorted(kept) == [256, 256, 256 * 4, 512 * 4]
