"""One tile's scores against the plain formula, and the exponents it may take."""

from __future__ import annotations

import pytest
import torch

from models.kernels import tile
from models.kernels.tile_factors import factors_of
from models.kernels.tiling import Inputs, Workspace, load
from tests.models.kernels.cases import linear_operands
from tests.support.closeness import assert_close


def one_tile(tokens: int, chunk: int) -> Inputs:
    q, k, v, log_decay, _ = linear_operands(1, tokens, heads=2, groups=1, dim=3)
    where = (slice(0, 1), slice(0, tokens), chunk)
    return load(Workspace(q), (q, k, v, log_decay, None), where, 1.0)


@pytest.mark.parametrize("chunk", [1, 2, 8, 16])
def test_scores_are_decayed_products_of_earlier_tokens(chunk: int) -> None:
    inputs = one_tile(16, chunk)
    scores = tile._scores(inputs, factors_of(inputs), Workspace(inputs.q))
    total = inputs.log_decay.cumsum(3)
    for index in torch.cartesian_prod(*(torch.arange(size) for size in scores.shape)).tolist():
        _, _, place, query, head, key = index
        expected = torch.zeros((), dtype=torch.float64)
        if key <= query:
            decay = (total[0, 0, place, query] - total[0, 0, place, key]).exp()
            expected = (
                inputs.q[0, 0, place, query, head] * decay * inputs.k[0, 0, place, key]
            ).sum()
        assert_close(scores[tuple(index)], expected, absolute=1e-13)


def test_no_factor_exceeds_one_however_strong_the_decay() -> None:
    inputs = one_tile(32, 32)
    strong = Inputs(inputs.q, inputs.k, inputs.v, 1e4 * inputs.log_decay, None)
    factors = factors_of(strong)
    every = [x for level in factors.levels for x in level] + [factors.prefix, factors.suffix]
    assert all(float(x.max()) <= 1.0 and float(x.min()) >= 0.0 for x in every)


def test_prefix_and_suffix_of_a_chunk_are_the_sums_around_each_token() -> None:
    inputs = one_tile(16, 16)
    factors = factors_of(inputs)
    total = inputs.log_decay.cumsum(3)
    assert_close(factors.prefix, total.exp(), relative=1e-14)
    assert_close(factors.suffix, (total[:, :, :, -1:] - total).exp(), relative=1e-14)
    assert_close(factors.total, total[:, :, :, -1].exp().unsqueeze(-1), relative=1e-14)


def test_a_tile_leaves_its_entering_state_and_gradient_untouched() -> None:
    inputs = one_tile(16, 8)
    state = torch.randn(1, 1, 3, 3, dtype=torch.float64)
    before = state.clone()
    out, _ = tile.forward(inputs, state, Workspace(inputs.q))
    grad = torch.ones_like(out)
    tile.backward(one_tile(16, 8), state, grad, state, None, Workspace(inputs.q))
    assert torch.equal(state, before)
    assert torch.equal(grad, torch.ones_like(grad))
