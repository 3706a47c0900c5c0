"""Captured counts are the neuron's, for the chosen sites only."""

from __future__ import annotations

import torch

from models.config import NeuronKind, SpikingConfig
from models.spiking.capture import CountCapture
from models.spiking.neurons import AdaptiveThreshold, Spikes


def test_keeps_the_counts_of_chosen_sites_in_order() -> None:
    neuron = AdaptiveThreshold(SpikingConfig(neuron=NeuronKind.adaptive, max_count=4))
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    capture = CountCapture(["0/ffn_in"])
    for part in x:
        neuron(part, Spikes(3.0, recorder=capture), "0/ffn_in")
        neuron(part, Spikes(3.0, recorder=capture), "1/ffn_in")
    with capture.paused():
        neuron(x, Spikes(3.0, recorder=capture), "0/ffn_in")
    counts, _ = neuron.encode(x, 3.0)
    assert set(capture.counts) == {"0/ffn_in"}
    assert torch.equal(capture.counts["0/ffn_in"], counts.reshape(10, 8).to(torch.int64))
    assert "1/ffn_in/mean_count" in capture.summary()
