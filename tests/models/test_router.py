from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from models.expert_config import Balance, ExpertConfig, RouterScore
from models.router import Choice, Router, tie_order
from tests.models.tiny import tiny_config
from tests.support.closeness import assert_close

E = 6
D = 24


def router(*, layer: int = 0, **changes: Any) -> Router:
    config = tiny_config(ffns="e*4", moe=ExpertConfig(**({"num_experts": E} | changes)))
    built = Router(config, layer=layer).double()
    generator = torch.Generator().manual_seed(5)
    built.weight.data.normal_(generator=generator)
    return built


def choose(built: Router, x: Tensor, positions: Tensor | None = None) -> Choice:
    if positions is None:
        positions = torch.arange(x.shape[1])[None]
    return built.choose(built(x), positions)


def tokens(rows: int, count: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, count, D, generator=generator, dtype=torch.float64)


def test_softmax_weights_are_those_before_the_choice() -> None:
    built, x = router(top_k=2), tokens(2, 7)
    found = choose(built, x)
    scores = (x @ built.weight.T).softmax(-1)
    best = scores.topk(2)
    assert_close(found.scores, scores, relative=1e-14)
    assert torch.equal(found.experts, best.indices)
    assert_close(found.weights, best.values, relative=1e-14)
    assert found.shares is found.scores


def test_sigmoid_scores_stand_alone() -> None:
    built, x = router(top_k=3, score=RouterScore.sigmoid), tokens(2, 7)
    found = choose(built, x)
    best = torch.sigmoid(x @ built.weight.T).topk(3)
    assert torch.equal(found.experts, best.indices)
    assert_close(found.weights, best.values, relative=1e-14)
    assert_close(found.shares.sum(-1), torch.ones(2, 7), relative=1e-14)
    assert_close(found.shares * found.scores.sum(-1, keepdim=True), found.scores, relative=1e-14)


@pytest.mark.parametrize("score", RouterScore)
def test_renormalised_weights_sum_to_one_with_their_gradient(score: RouterScore) -> None:
    built, x = router(top_k=2, renormalise=True, score=score), tokens(1, 5)
    found = choose(built, x)
    assert_close(found.weights.sum(-1), torch.ones(1, 5), relative=1e-14)
    logits = x @ built.weight.T
    scores = logits.softmax(-1) if score is RouterScore.softmax else logits.sigmoid()
    best = scores.topk(2).values
    expected = best / best.sum(-1, keepdim=True)
    used = tokens(1, 5, seed=9)[..., :2]
    gradients = [torch.autograd.grad((w * used).sum(), built.weight)[0]
                 for w in (found.weights, expected)]  # fmt: skip
    assert_close(*gradients, relative=1e-12)


def test_sigmoids_that_vanish_stay_finite() -> None:
    built = router(top_k=2, renormalise=True, score=RouterScore.sigmoid)
    found = built.choose(torch.full((1, 3, E), -2000.0), torch.arange(3)[None])
    assert torch.equal(found.weights, torch.zeros(1, 3, 2))
    assert torch.equal(found.shares, torch.zeros(1, 3, E))


def test_the_bias_moves_the_choice_and_not_the_weight() -> None:
    built, x = router(balance=Balance.bias), tokens(2, 9)
    assert built.selection_bias is not None
    built.selection_bias.data = torch.tensor([0.0, 0.0, 0.0, 9.0, 0.0, 0.0])
    found = choose(built, x)
    assert bool((found.experts == 3).all())
    assert_close(found.weights[..., 0], (x @ built.weight.T).softmax(-1)[..., 3], relative=1e-14)


def test_ties_are_spread_evenly() -> None:
    """A router that starts at zero."""
    count = 3000
    for top_k in (1, 2):
        built = router(top_k=top_k)
        built.weight.data.zero_()
        chosen = choose(built, tokens(1, count)).experts
        load = torch.bincount(chosen.flatten(), minlength=E) / (count * top_k)
        assert float((load * E - 1).abs().max()) < 0.1
        assert bool((chosen.sort(-1).values.diff(dim=-1) > 0).all()), "an expert twice"


def test_ties_are_broken_by_seed_layer_and_position_in_the_document() -> None:
    positions = torch.arange(500)
    first = tie_order(positions, E, seed=0, layer=0)
    assert first.shape == (500, E)
    assert bool((first.sort(-1).values.diff(dim=-1) > 0).all()), "no two alike"
    assert torch.equal(tie_order(positions[None, 20:30], E, seed=0, layer=0)[0], first[20:30])
    others = [tie_order(positions, E, seed=1, layer=0), tie_order(positions, E, seed=0, layer=1)]
    for other in others:
        same = float((other.argmax(-1) == first.argmax(-1)).double().mean())
        assert same == pytest.approx(1 / E, abs=0.08)


def test_only_exact_ties_are_broken_by_the_hash() -> None:
    order = tie_order(torch.arange(1), 3, seed=0, layer=0)[None]
    last = int(order.argmin())
    logits = torch.zeros(1, 1, 3, dtype=torch.float64)
    logits[..., last] = 1e-12
    built = router(num_experts=3, top_k=1)
    assert int(built.choose(logits, torch.zeros(1, 1, dtype=torch.int64)).experts) == last


def test_positions_and_not_rows_decide() -> None:
    built = router()
    built.weight.data.zero_()
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]])
    chosen = choose(built, tokens(2, 5), positions).experts[..., 0]
    assert chosen[0].tolist()[:3] == chosen[1].tolist()[2:]
    assert chosen[0].tolist()[3:] == chosen[1].tolist()[:2]


def test_a_narrow_input_is_widened_first() -> None:
    built = router()
    built.weight.data = built.weight.data.float()
    x = tokens(1, 4).bfloat16()
    logits = built(x)
    assert logits.dtype is torch.float32
    assert_close(logits, x.double() @ built.weight.double().T, relative=1e-6)
    assert choose(built, x).weights.dtype is torch.float32


@pytest.mark.parametrize("balance", Balance)
def test_what_is_remembered_is_frozen(balance: Balance) -> None:
    frozen = {n for n, p in router(balance=balance).named_parameters() if not p.requires_grad}
    names = {Balance.bias: {"selection_bias"}, Balance.previous_step: {"previous_load"}}
    assert frozen == names.get(balance, set())
