from __future__ import annotations

import pytest
import torch

from models.layers import Embedding, Head, Linear, LocalLayers
from tests.support.closeness import assert_close


@pytest.mark.parametrize(
    ("activations", "weights"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)],
    ids=["bf16-in-fp32-weights", "fp32-in-bf16-weights"],
)
def test_a_linear_computes_in_the_dtype_of_its_input(
    activations: torch.dtype, weights: torch.dtype
) -> None:
    linear = Linear(6, 4).to(weights)
    torch.nn.init.normal_(linear.weight)
    torch.nn.init.normal_(linear.bias)
    x = torch.randn(3, 6).to(activations)
    out = linear(x)
    assert out.dtype == activations
    weight, bias = linear.weight.to(activations), linear.bias.to(activations)
    assert_close(out, torch.nn.functional.linear(x, weight, bias))
    out.float().sum().backward()
    assert linear.weight.grad is not None
    assert linear.weight.grad.dtype == weights


@pytest.mark.parametrize("kind", ["column", "row", "replicated", "embedding", "head"])
def test_parameters_nobody_filled_are_nan(kind: str) -> None:
    layers = LocalLayers()
    module = {
        "column": lambda: layers.column_linear(3, 4, bias=True),
        "row": lambda: layers.row_linear(3, 4, bias=True),
        "replicated": lambda: layers.replicated_linear(3, 4, bias=True),
        "embedding": lambda: layers.embedding(3, 4),
        "head": lambda: layers.head(3, 4, is_tied=False),
    }[kind]()
    parameters = list(module.parameters())
    assert parameters
    assert all(parameter.isnan().all() for parameter in parameters)


def test_a_tied_head_owns_nothing_and_reads_the_given_weight() -> None:
    embedding = Embedding(5, 3)
    torch.nn.init.normal_(embedding.weight)
    head = Head(3, 5, is_tied=True)
    assert list(head.parameters()) == []
    hidden = torch.randn(2, 4, 3)
    assert_close(head(hidden, tied_weight=embedding.weight), hidden @ embedding.weight.T)
    with pytest.raises(AssertionError, match="given the embedding's weight"):
        head(hidden)


def test_head_losses_are_shaped_like_labels_and_add_up() -> None:
    head = Head(3, 5, is_tied=False).double()
    torch.nn.init.normal_(head.weight)
    hidden = torch.randn(2, 4, 3, dtype=torch.float64)
    labels = torch.tensor([[0, 4, -100, 2], [1, -100, 3, 3]])
    losses = head(hidden, labels, per_token=True, chunk_tokens=3)
    assert losses.shape == labels.shape
    assert_close(head(hidden, labels, chunk_tokens=3), losses.sum(), relative=1e-14)


def test_the_channel_mean_is_in_at_least_float32() -> None:
    x = torch.full((2, 1024), -1.0, dtype=torch.bfloat16)
    x[:, 0] = 5.0
    mean = LocalLayers().cut_channels.mean_abs(x)
    assert mean.dtype == torch.float32
    assert_close(mean, torch.full((2, 1), 1028 / 1024))
    assert LocalLayers().whole_channels.mean_abs(x.double()).dtype == torch.float64
