"""Routed experts on sorted rows against one dense SwiGLU a row."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.config import NeuronKind, SpikingConfig
from models.experts import Experts
from models.grouped_linear import Groups
from models.layers import LocalLayers
from models.spiking.neurons import Spikes, build_neuron
from models.spiking.recorder import SpikeRecorder
from tests.support.closeness import assert_close

E, D, INNER = 3, 8, 10
SPIKING = SpikingConfig(neuron=NeuronKind.adaptive)


def experts(*, again: bool = False) -> Experts:
    built = LocalLayers().experts(
        E, D, INNER, neuron=build_neuron(SPIKING), layer=5, activations_again=again
    )
    assert isinstance(built, Experts)
    generator = torch.Generator().manual_seed(1)
    for parameter in built.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return built


def rows(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, D, generator=generator, dtype=torch.float64)


def _looped(built: Experts, x: Tensor, counts: list[int], k: float | None) -> Tensor:
    outs = []
    start = 0
    for expert, count in enumerate(counts):
        part = x[start : start + count]
        gate, up, down = (
            p.weight[expert] for p in (built.gate_proj, built.up_proj, built.down_proj)
        )
        inner = F.silu(part @ gate.T) * (part @ up.T)
        if k is not None:
            threshold = inner.abs().mean(-1, keepdim=True) / k
            spiked = threshold * torch.round(inner / threshold)
            inner = inner + (spiked - inner).detach()
        outs.append(inner @ down.T)
        start += count
    return torch.cat(outs)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("k", [None, 2.5])
def test_grouped_experts_equal_looped_ones(again: bool, k: float | None) -> None:
    counts = [4, 0, 3]
    built, x = experts(again=again), rows(7).requires_grad_()
    spikes = None if k is None else Spikes(k=k)
    out = built(x, Groups(torch.tensor(counts)), spikes)
    expected = _looped(built, x, counts, k)
    assert_close(out, expected, relative=1e-13)
    leaves = (x, *built.parameters())
    found = torch.autograd.grad(out.square().sum(), leaves)
    wanted = torch.autograd.grad(expected.square().sum(), leaves)
    for left, right in zip(found, wanted, strict=True):
        assert_close(left, right, relative=1e-12)


def test_weights_hold_nan_until_they_are_filled() -> None:
    built = LocalLayers().experts(E, D, INNER, neuron=None, layer=0, activations_again=False)
    shapes = {name: tuple(p.shape) for name, p in built.named_parameters()}
    assert shapes == {
        "gate_proj.weight": (E, INNER, D), "up_proj.weight": (E, INNER, D),
        "down_proj.weight": (E, D, INNER),
    }  # fmt: skip
    assert all(bool(p.isnan().all()) for p in built.parameters())


def test_rows_that_fill_up_are_not_counted_as_silent() -> None:
    built, x = experts(), rows(6)
    is_real = torch.tensor([True, False, True, True, True, False])
    x[~is_real] = 0.0
    padded = Groups(torch.full((3,), 2), length=2, is_real=is_real)
    found, wanted = SpikeRecorder(100), SpikeRecorder(100)
    out = built(x, padded, Spikes(k=3.0, recorder=found))
    kept = built(x[is_real], Groups(torch.tensor([1, 2, 1])), Spikes(k=3.0, recorder=wanted))
    assert_close(out[is_real], kept, relative=1e-13)
    assert torch.equal(out[~is_real], torch.zeros(2, D, dtype=torch.float64))
    assert list(found.tensors()) == ["5/expert_out"]
    assert torch.equal(found.tensors()["5/expert_out"], wanted.tensors()["5/expert_out"])
