from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.loss import chunked_cross_entropy, chunked_token_losses
from tests.support.closeness import assert_close


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


def test_inputs_are_not_changed() -> None:
    hidden, weight, labels = _inputs(9, dtype=torch.float32)
    before = hidden.detach().clone(), weight.detach().clone(), labels.clone()
    chunked_cross_entropy(hidden, weight, labels, chunk_tokens=4).backward()
    for now, then in zip((hidden, weight, labels), before, strict=True):
        assert torch.equal(now, then)


def test_a_second_derivative_is_refused_not_wrong() -> None:
    hidden, weight, labels = _inputs(9)
    loss = chunked_cross_entropy(hidden, weight, labels, chunk_tokens=4)
    (first,) = torch.autograd.grad(loss.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


class _CountProducts(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("frozen", "products"), [(None, 8), (0, 6), (1, 6)])
def test_a_frozen_input_costs_no_gradient(frozen: int | None, products: int) -> None:
    inputs = _inputs(8)
    if frozen is not None:
        inputs[frozen].requires_grad_(False)
    with _CountProducts() as counted:
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


class _PeakBytes(TorchDispatchMode):
    """The most bytes held at once by storages that operators under this mode returned."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.largest = max(self.largest, storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out


def test_peak_memory_of_the_loss_does_not_grow_with_tokens() -> None:
    dim, vocab, chunk = 4, 512, 32
    peaks, largest = [], []
    for tokens in (128, 1024):
        hidden, weight, labels = _inputs(tokens, dim=dim, vocab=vocab, dtype=torch.float32)
        with _PeakBytes() as memory:
            chunked_cross_entropy(hidden, weight, labels, chunk_tokens=chunk).backward()
        per_token = tokens * (2 * dim + 8) * 4
        peaks.append(memory.peak - per_token)
        largest.append(memory.largest)
    one_chunk = chunk * vocab * 4
    assert max(largest) <= one_chunk
    # What is left after the token-sized vectors (d_hidden, losses, labels) is a few chunks.
    assert peaks[1] <= peaks[0] + one_chunk // 4
    assert peaks[0] <= 5 * one_chunk
