"""When spiking starts, how k moves and how the spiked value is blended in."""

from __future__ import annotations

import pytest

from models.config import NeuronKind, SpikingConfig
from models.spiking.neurons import Spikes
from models.spiking.recorder import SpikeRecorder
from models.spiking.schedule import spikes_at


def config(**fields: object) -> SpikingConfig:
    return SpikingConfig(neuron=NeuronKind.adaptive, **fields)  # type: ignore[arg-type]


def test_off_is_always_continuous() -> None:
    assert spikes_at(SpikingConfig(), 10_000) is None


def test_starts_whole_at_the_start_step() -> None:
    recorder = SpikeRecorder(4)
    assert spikes_at(config(start_step=5), 4, recorder) is None
    assert spikes_at(config(start_step=5), 5, recorder) == Spikes(3.0, 1.0, recorder)
    assert spikes_at(config(), 0) == Spikes(3.0, 1.0, None)


def test_k_moves_linearly_and_then_stays() -> None:
    annealed = config(k=3.0, k_start=8.0, start_step=2, anneal_steps=5)
    ks = [spikes.k for step in range(2, 10) if (spikes := spikes_at(annealed, step))]
    assert ks == pytest.approx([8, 7, 6, 5, 4, 3, 3, 3], rel=1e-12)


def test_blend_is_never_zero_and_whole_on_the_last_blend_step() -> None:
    blended = config(start_step=1, blend_steps=4)
    blends = [spikes.blend for step in range(7) if (spikes := spikes_at(blended, step))]
    assert blends == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
