from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.dispatch import Dispatch, capacity, dispatch
from tests.support.closeness import assert_close

D = 5


def experts(*rows: list[int] | list[list[int]]) -> Tensor:
    """`[B, T, K]` of rows of one choice, or of several."""
    chosen = torch.tensor(rows)
    return chosen if chosen.dim() == 3 else chosen[..., None]


def kept(plan: Dispatch, *, rows: int) -> list[list[int]]:
    """Positions (of the flattened choices) of each row that were kept."""
    assert plan.is_kept is not None
    return [row.flatten().nonzero().flatten().tolist() for row in plan.is_kept.chunk(rows)]


def test_rows_are_sorted_by_expert_then_by_place() -> None:
    plan = dispatch(experts([2, 0, 2], [0, 2, 1]), 4, capacity_factor=None)
    assert plan.source.tolist() == [1, 3, 5, 0, 2, 4]
    assert plan.groups.counts.tolist() == [2, 1, 3, 0]
    assert plan.counts.tolist() == [[1, 0, 2, 0], [1, 1, 1, 0]]
    assert plan.place.flatten().tolist() == [3, 0, 4, 1, 5, 2]
    assert plan.is_kept is None
    assert int(plan.num_dropped) == 0


def test_the_first_of_each_row_are_kept() -> None:
    """Capacity 2 of 6 tokens on 3 experts: which tokens drop, whatever the other row does."""
    chosen = experts([1, 1, 0, 1, 1, 2], [0, 0, 0, 0, 0, 0])
    plan = dispatch(chosen, 3, capacity_factor=1.0)
    assert kept(plan, rows=2) == [[0, 1, 2, 5], [0, 1]]
    assert int(plan.num_dropped) == 6
    assert plan.groups.length == 4
    assert plan.groups.is_real is not None
    assert plan.groups.is_real.view(3, 2, 2).tolist() == [
        [[True, False], [True, True]], [[True, True], [False, False]],
        [[True, False], [False, False]],
    ]  # fmt: skip
    for row in range(2):
        alone = dispatch(chosen[row : row + 1], 3, capacity_factor=1.0)
        assert kept(alone, rows=1)[0] == kept(plan, rows=2)[row]


def test_earlier_positions_come_before_better_choices() -> None:
    chosen = experts([[0, 1], [1, 0], [2, 0]])
    plan = dispatch(chosen, 3, capacity_factor=1.0)
    assert capacity(1.0, top_k=2, num_tokens=3, num_experts=3) == 2
    assert kept(plan, rows=1) == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("factor", "sizes", "expected"),
    [
        (1.0, (1, 64, 8), 8), (1.25, (2, 64, 8), 20), (1.0, (1, 7, 3), 3),
        (0.01, (1, 8, 8), 1), (9.0, (2, 16, 4), 16), (1.1, (1, 80, 8), 11),
    ],
)  # fmt: skip
def test_capacity_is_rounded_up_and_never_above_a_row(
    factor: float, sizes: tuple[int, int, int], expected: int
) -> None:
    top_k, num_tokens, num_experts = sizes
    found = capacity(factor, top_k=top_k, num_tokens=num_tokens, num_experts=num_experts)
    assert found == expected


@pytest.mark.parametrize("factor", [None, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("top_k", [1, 2])
def test_there_and_back_is_a_masked_weighted_sum(factor: float | None, top_k: int) -> None:
    """Values and both gradients, experts that double or negate their rows."""
    generator = torch.Generator().manual_seed(3)
    B, T, E = 2, 7, 3
    scores = torch.rand(B, T, E, generator=generator)
    chosen = scores.topk(top_k).indices
    plan = dispatch(chosen, E, capacity_factor=factor)
    x = torch.randn(B, T, D, generator=generator, dtype=torch.float64).requires_grad_()
    weights = torch.rand(B, T, top_k, generator=generator, dtype=torch.float64).requires_grad_()
    factors = torch.tensor([2.0, -1.0, 3.0], dtype=torch.float64)
    scale = factors.repeat_interleave(plan.groups.counts)[:, None]
    out = plan.combine(plan.rows(x) * scale, weights)
    mask = torch.ones(B, T, top_k) if plan.is_kept is None else plan.is_kept.view(B, T, top_k)
    expected = x * (weights * mask * factors[chosen]).sum(-1, keepdim=True)
    assert_close(out, expected, relative=1e-14)
    used = torch.randn(B, T, D, generator=generator, dtype=torch.float64)
    for left, right in zip(
        torch.autograd.grad(out, (x, weights), used),
        torch.autograd.grad(expected, (x, weights), used),
        strict=True,
    ):
        assert_close(left, right, relative=1e-14)


def test_rows_that_fill_up_get_no_gradient() -> None:
    plan = dispatch(experts([1, 1, 1, 0]), 3, capacity_factor=1.5)
    assert plan.groups.is_real is not None
    rows = torch.randn(6, D, dtype=torch.float64).requires_grad_()
    plan.combine(rows, torch.ones(1, 4, 1, dtype=torch.float64)).sum().backward()
    assert rows.grad is not None
    assert torch.equal(rows.grad.any(dim=1), plan.groups.is_real)


def test_sums_are_wider_than_narrow_rows() -> None:
    """256 + 1 is 256 in bfloat16; weights keep their own precision."""
    plan = dispatch(experts([[0, 1, 2]]), 3, capacity_factor=None)
    rows = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16).requires_grad_()
    weights = torch.ones(1, 1, 3, requires_grad=True)
    out = plan.combine(rows, weights)
    assert out.dtype is torch.bfloat16
    assert float(out.detach()) == 258.0
    out.sum().backward()
    assert rows.grad is not None
    assert weights.grad is not None
    assert rows.grad.dtype is torch.bfloat16
    assert weights.grad.tolist() == [[[256.0, 1.0, 1.0]]]
