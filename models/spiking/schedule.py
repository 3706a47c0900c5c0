"""When spiking is on and how strongly: pure functions of the optimizer step."""

from __future__ import annotations

from models.config import NeuronKind, SpikingConfig
from models.spiking.neurons import Spikes
from models.spiking.recorder import SpikeRecorder


def spikes_at(
    config: SpikingConfig, step: int, recorder: SpikeRecorder | None = None
) -> Spikes | None:
    """Return how to spike at an optimizer step, or None while activations are continuous.

    Off, or before `start_step`: None. `start_step` itself has `k_start`; `k` is reached
    `anneal_steps` later. The blend grows by 1 / `blend_steps` a step and is whole on the
    `blend_steps`-th spiking step.
    """
    if config.neuron is NeuronKind.off or step < config.start_step:
        return None
    elapsed = step - config.start_step
    k_start = config.k if config.k_start is None else config.k_start
    annealed = min(1.0, elapsed / config.anneal_steps) if config.anneal_steps > 0 else 1.0
    blend = min(1.0, (elapsed + 1) / config.blend_steps) if config.blend_steps > 0 else 1.0
    k = config.k if annealed == 1.0 else k_start + (config.k - k_start) * annealed
    return Spikes(k=k, blend=blend, recorder=recorder)
