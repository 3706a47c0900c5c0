"""Sink tokens in softmax attention: the merge, and attention of sinks among themselves."""

from __future__ import annotations

import pytest
import torch

from models.kernels import SinkKeys, sink_attention
from models.kernels.sinks import merge
from tests.support.closeness import assert_close


def normal(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("distance", [0.0, 40.0, -40.0, 1000.0, -1000.0])
def test_two_parts_merge_into_one_softmax(distance: float) -> None:
    first, second = normal(3, 5), normal(3, 4) + distance
    values = normal(9, 6)
    parts = [
        (scores.softmax(-1) @ part, scores.logsumexp(-1))
        for scores, part in zip((first, second), values.split([5, 4]), strict=True)
    ]
    out, lse = merge(parts[0], parts[1])
    scores = torch.cat([first, second], dim=1)
    assert_close(out, scores.softmax(-1) @ values, relative=1e-14)
    assert_close(lse, scores.logsumexp(-1), relative=1e-14)


def test_half_precision_parts_merge_in_float32() -> None:
    out, lse = normal(2, 8).bfloat16(), normal(2).float()
    merged, total = merge((out, lse), (out, lse + 1))
    assert merged.dtype is torch.bfloat16
    assert total.dtype is torch.float32
    assert torch.equal(merged, out)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_sinks_see_all_sinks(groups: int) -> None:
    q = normal(1, 7, 4, 3).requires_grad_()
    k, v = (normal(7, groups, 3 + 0 * i).mul(i + 1).requires_grad_() for i in range(2))
    out = sink_attention(q, SinkKeys(k, v), scale=0.4)
    expected = []
    for sink in range(7):
        for head in range(4):
            group = head // (4 // groups)
            weights = (0.4 * k[:, group] @ q[0, sink, head]).softmax(0)
            expected.append(weights @ v[:, group])
    slow = torch.stack(expected).view(1, 7, 4, 3)
    assert_close(out, slow, relative=1e-13)
    weight = normal(1, 7, 4, 3)
    grads = [torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (out, slow)]
    for actual, wanted in zip(*grads, strict=True):
        assert_close(actual, wanted, relative=1e-12)
