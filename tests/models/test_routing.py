"""Metrics of expert layers against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models.balance import selection_bias_change
from models.config import ModelConfig
from models.expert_config import ExpertConfig
from models.layers import LocalLayers, Parts
from models.mixture_of_experts import MixtureOfExperts
from models.recomputation import NOTHING
from models.routing import SUMS, Routing, RoutingRecorder, StepRouting
from tests.models.tiny import tiny_config


def sums(**values: float) -> dict[str, Tensor]:
    return {name: torch.tensor(values.get(name, 0.0)) for name in SUMS}


def step_of(
    *recorders: RoutingRecorder, num_experts: int, num_tokens: int, top_k: int = 1
) -> StepRouting:
    """As the ranks' numbers are summed."""
    total: dict[str, Tensor] = {}
    for rank, recorder in enumerate(recorders):
        for name, vector in recorder.tensors(rank=rank, num_ranks=len(recorders)).items():
            total[name] = total.get(name, torch.zeros_like(vector)) + vector
    moe = ExpertConfig(num_experts=num_experts, top_k=top_k)
    return StepRouting.of(total, moe, num_tokens=num_tokens)


def test_ranks_and_microbatches_add_up_and_the_largest_logit_stays() -> None:
    left, right = RoutingRecorder(), RoutingRecorder()
    left.add(3, torch.tensor([2, 0, 1]), sums(dropped=1, entropy=2.0), torch.tensor(5.0))
    left.add(3, torch.tensor([1, 0, 2]), sums(z_loss=0.5, entropy=1.0), torch.tensor(7.0))
    right.add(3, torch.tensor([4, 0, 2]), sums(dropped=2, z_loss=0.25), torch.tensor(6.0))
    right.add(10, torch.tensor([1, 2, 3]), sums(balance_loss=0.125), torch.tensor(1.0))
    left.add(10, torch.tensor([2, 2, 2]), sums(), torch.tensor(2.0))
    step = step_of(left, right, num_experts=3, num_tokens=6, top_k=2)
    assert step.metrics() == {
        "moe/3/load_max": 7 / 12, "moe/3/load_min": 0.0, "moe/3/dead_experts": 1.0,
        "moe/3/dropped_share": 3 / 12, "moe/3/entropy": 0.5, "moe/3/max_logit": 7.0,
        "moe/10/load_max": 5 / 12, "moe/10/load_min": 3 / 12, "moe/10/dead_experts": 0.0,
        "moe/10/dropped_share": 0.0, "moe/10/entropy": 0.0, "moe/10/max_logit": 2.0,
        "moe/balance_loss": 0.125, "moe/z_loss": 0.75,
    }  # fmt: skip
    assert step.load_metrics()["moe/10/load_1"] == 4 / 12
    assert len(step.load_metrics()) == 6
    assert step.loads(3).tolist() == [7 / 12, 0.0, 5 / 12]


def test_a_layer_that_another_rank_has_is_there_too() -> None:
    """Pipeline stages: each rank has layers of its own."""
    left, right = RoutingRecorder(), RoutingRecorder()
    left.add(0, torch.tensor([1, 3]), sums(), torch.tensor(1.0))
    right.add(1, torch.tensor([2, 2]), sums(), torch.tensor(4.0))
    step = step_of(left, right, num_experts=2, num_tokens=4)
    assert (step.max_logits[0], step.max_logits[1]) == (1.0, 4.0)
    assert step.counts[1].tolist() == [2, 2]


def test_a_paused_recorder_keeps_its_numbers() -> None:
    recorder = RoutingRecorder()
    with recorder.paused(), recorder.paused():
        recorder.add(0, torch.tensor([1, 1]), sums(), torch.tensor(1.0))
    assert recorder.tensors(rank=0, num_ranks=1) == {}


def test_the_bias_moves_up_for_experts_that_few_choose() -> None:
    counts = torch.tensor([5.0, 3.0, 3.0, 1.0], dtype=torch.float64)
    assert selection_bias_change(counts, 0.25).tolist() == [-0.25, 0.0, 0.0, 0.25]


def _layer(config: ModelConfig) -> MixtureOfExperts:
    parts = Parts(
        config=config,
        layers=LocalLayers(),
        kernels=None,  # type: ignore[arg-type]
        rotary=None,  # type: ignore[arg-type]
        build_neuron=lambda _: None,
        recompute=NOTHING,
    )
    layer = MixtureOfExperts(parts, layer=2).double()
    for parameter in layer.parameters():
        parameter.data.fill_(0.01)
    return layer


def test_a_layer_records_what_its_logits_say() -> None:
    """Four tokens of one row whose logits are (log 3, 0) or (0, log 3), the first kind thrice."""
    moe = ExpertConfig(
        num_experts=2, num_shared_experts=0, capacity_factor=1.0, balance_coefficient=0.5,
        z_loss_coefficient=0.25,
    )  # fmt: skip
    layer = _layer(tiny_config(hidden_size=2, mixers="_", ffns="e", moe=moe))
    layer.router.weight.data = math.log(3) * torch.eye(2, dtype=torch.float64)
    x = torch.eye(2, dtype=torch.float64)[[0, 0, 1, 0]][None]
    recorder = RoutingRecorder()
    routing = Routing(num_rows=5, num_tokens=20, recorder=recorder)
    out = layer(x, torch.arange(4)[None], None, routing)
    metrics = step_of(recorder, num_experts=2, num_tokens=4).metrics()
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    # Shares 3/4 and 1/4 of choices, mean scores 5/8 and 3/8.
    balance = 0.5 * 2 * (3 / 4 * 5 / 8 + 1 / 4 * 3 / 8) / 5
    expected = {
        "moe/2/load_max": 0.75, "moe/2/load_min": 0.25, "moe/2/dead_experts": 0.0,
        "moe/2/dropped_share": 0.25, "moe/2/entropy": entropy, "moe/2/max_logit": math.log(3),
        "moe/balance_loss": balance, "moe/z_loss": 0.25 * 4 * math.log(4) ** 2 / 20,
    }  # fmt: skip
    assert metrics == pytest.approx(expected, rel=1e-12)
    # Capacity 2 leaves the third token of expert 0, the row's last, without one.
    assert out[0].any(dim=-1).tolist() == [True, True, True, False]
