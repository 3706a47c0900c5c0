"""The adaptive-threshold neuron: counts, threshold and gradients, against their definitions."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.config import NeuronKind, SpikingConfig, ThresholdGrad
from models.spiking.channels import Channels, mean_abs
from models.spiking.neurons import (
    MAX_THRESHOLD,
    MIN_THRESHOLD,
    AdaptiveThreshold,
    Spikes,
    build_neuron,
)
from models.spiking.recorder import SpikeRecorder


def neuron(**overrides: object) -> AdaptiveThreshold:
    config = SpikingConfig(neuron=NeuronKind.adaptive, **overrides)  # type: ignore[arg-type]
    built = build_neuron(config)
    assert isinstance(built, AdaptiveThreshold)
    return built


def activations(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def defined_spike(x: Tensor, k: float, blend: float, max_count: int | None) -> Tensor:
    """Equations 19 and 21 in plain autograd; only the rounding step is skipped in backward."""
    threshold = x.abs().mean(-1, keepdim=True) / k
    ratio = x / threshold
    counts = torch.round(ratio)
    if max_count is not None:
        counts = counts.clamp(-max_count, max_count)
    straight_through = ratio + (counts - ratio).detach()
    return (1 - blend) * x + blend * threshold * straight_through


def test_off_builds_no_neuron() -> None:
    assert build_neuron(SpikingConfig()) is None


def test_no_spikes_passes_the_same_tensor_on() -> None:
    x = activations(2, 3, 8)
    assert neuron()(x, None, "0/ffn_in") is x
    assert neuron()(x, Spikes(3.0, blend=0.0), "0/ffn_in") is x


def test_has_no_parameters_and_copies() -> None:
    built = neuron()
    assert not list(built.parameters())
    assert not built.state_dict()
    x = activations(4, 8)
    spikes = Spikes(3.0)
    assert torch.equal(copy.deepcopy(built)(x, spikes, "s"), built(x, spikes, "s"))


@pytest.mark.parametrize("k", [2.0, 3.0, 4.5])
def test_counts_and_threshold_follow_the_equations(k: float) -> None:
    x = activations(2, 5, 33)
    counts, threshold = neuron().encode(x, k)
    expected = x.abs().sum(-1, keepdim=True) / 33 / k
    torch.testing.assert_close(threshold, expected, rtol=1e-15, atol=0)
    assert torch.equal(counts, torch.round(x / threshold))
    spiked = neuron()(x, Spikes(k), "0/mixer_in")
    assert torch.equal(spiked, counts * threshold)
    assert float((spiked - x).abs().max() / threshold.max()) <= 0.5


def test_halves_round_to_even() -> None:
    built = AdaptiveThreshold(
        SpikingConfig(neuron=NeuronKind.adaptive), Channels(mean_abs=lambda x: torch.ones(1, 1))
    )
    counts, _ = built.encode(torch.tensor([[0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5]]), 1.0)
    assert counts.tolist() == [[0, 2, 2, 4, 0, -2, -2]]


@pytest.mark.parametrize(("scale", "bound"), [(0.0, MIN_THRESHOLD), (1e9, MAX_THRESHOLD)])
def test_threshold_stays_within_bounds(scale: float, bound: float) -> None:
    x = activations(4, 16) * scale
    counts, threshold = neuron().encode(x, 3.0)
    assert threshold.flatten().tolist() == [bound] * 4
    assert torch.equal(counts, torch.round(x / bound))


def test_clip_bounds_counts_on_both_sides() -> None:
    x = torch.zeros(1, 100, dtype=torch.float64)
    x[0, 0], x[0, 1] = 60.0, -60.0
    x[0, 2:] = 0.5
    counts, _ = neuron(max_count=7).encode(x, 3.0)
    assert counts[0, :3].tolist() == [7, -7, 1]
    assert float(neuron().encode(x, 3.0)[0].max()) == 107.0


@pytest.mark.parametrize("shape", [(3, 7), (2, 3, 16)])
@pytest.mark.parametrize("max_count", [None, 3])
def test_detached_gradient_is_the_identity(shape: tuple[int, ...], max_count: int | None) -> None:
    x = activations(*shape).requires_grad_()
    gradient = activations(*shape, seed=1)
    neuron(max_count=max_count)(x, Spikes(3.0, blend=0.5), "s").backward(gradient)
    assert x.grad is not None
    assert torch.equal(x.grad, gradient)


@pytest.mark.parametrize("blend", [1.0, 0.3])
@pytest.mark.parametrize("max_count", [None, 3])
def test_through_gradient_is_autograd_of_the_definition(
    blend: float, max_count: int | None
) -> None:
    x = activations(4, 9)
    gradient = activations(4, 9, seed=1)
    ours, defined = x.clone().requires_grad_(), x.clone().requires_grad_()
    built = neuron(threshold_grad=ThresholdGrad.through, max_count=max_count)
    output = built(ours, Spikes(2.5, blend=blend), "s")
    expected = defined_spike(defined, 2.5, blend, max_count)
    torch.testing.assert_close(output, expected, rtol=1e-13, atol=1e-13)
    output.backward(gradient)
    expected.backward(gradient)
    assert ours.grad is not None
    assert defined.grad is not None
    torch.testing.assert_close(ours.grad, defined.grad, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(ours.grad, gradient)


def test_through_gradient_keeps_eulers_identity() -> None:
    """The spiked value is homogeneous of degree 1, so its Jacobian times x is itself."""
    x = activations(11)

    def spiked(x: Tensor) -> Tensor:
        built = neuron(threshold_grad=ThresholdGrad.through)
        return built(x[None], Spikes(3.0), "s")[0]

    jacobian = torch.autograd.functional.jacobian(spiked, x)
    assert isinstance(jacobian, Tensor)
    torch.testing.assert_close(jacobian @ x, spiked(x), rtol=1e-12, atol=1e-12)


def test_through_gradient_is_the_identity_where_the_threshold_sits_on_a_bound() -> None:
    x = (activations(3, 8) * 1e7).requires_grad_()
    gradient = activations(3, 8, seed=1)
    neuron(threshold_grad=ThresholdGrad.through)(x, Spikes(3.0), "s").backward(gradient)
    assert x.grad is not None
    assert torch.equal(x.grad, gradient)


def test_bfloat16_counts_come_from_a_float32_threshold() -> None:
    x = activations(4, 512).to(torch.bfloat16)
    counts, threshold = neuron().encode(x, 3.0)
    assert counts.dtype == threshold.dtype == torch.float32
    wide = x.double()
    expected = wide.abs().mean(-1, keepdim=True) / 3
    torch.testing.assert_close(threshold.double(), expected, rtol=1e-6, atol=0)
    assert int((counts.double() != torch.round(wide / expected)).sum()) <= 1
    spiked = neuron()(x, Spikes(3.0), "s")
    assert spiked.dtype == torch.bfloat16
    assert torch.equal(spiked, (counts * threshold).to(torch.bfloat16))


def test_threshold_is_the_mean_over_all_channels_when_they_are_sharded() -> None:
    x = activations(3, 12)
    whole, _ = neuron().encode(x, 3.0)
    mean = mean_abs(x)
    sharded = AdaptiveThreshold(
        SpikingConfig(neuron=NeuronKind.adaptive), Channels(mean_abs=lambda shard: mean)
    )
    parts = [sharded.encode(shard, 3.0)[0] for shard in x.split([4, 8], dim=-1)]
    assert torch.equal(torch.cat(parts, dim=-1), whole)


def test_not_a_number_stays_visible() -> None:
    x = activations(2, 8)
    x[0, 3] = float("nan")
    recorder = SpikeRecorder(8)
    spiked = neuron()(x, Spikes(3.0, recorder=recorder), "0/s")
    assert bool(spiked[0].isnan().all())
    assert bool(spiked[1].isfinite().all())
    assert recorder.summary()["0/s/mean_count"] != recorder.summary()["0/s/mean_count"]


def test_recomputation_records_once() -> None:
    recorder = SpikeRecorder(16)
    x = activations(4, 8).requires_grad_()
    built = neuron()

    def block(x: Tensor) -> Tensor:
        hidden: Tensor = built(x, Spikes(3.0, recorder=recorder), "0/s")
        return hidden.square()

    output = checkpoint(
        block,
        x,
        use_reentrant=False,
        context_fn=lambda: (torch.enable_grad(), recorder.paused()),
    )
    before = {name: sums.clone() for name, sums in recorder.tensors().items()}
    output.sum().backward()
    assert float(before["0/s"][:-2].sum()) == 32
    assert torch.equal(recorder.tensors()["0/s"], before["0/s"])
