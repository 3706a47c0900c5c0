from __future__ import annotations

import torch

from models.config import NeuronKind, SpikingConfig
from models.spiking.neurons import Spikes
from tests.models.tiny import tiny_config, tiny_model
from tests.support.closeness import assert_close


def _by_formula(w: dict[str, torch.Tensor], x: torch.Tensor, spike: object) -> torch.Tensor:
    encode = spike if callable(spike) else (lambda value: value)
    x = encode(x)
    gate = x @ w["gate_proj.weight"].T + w["gate_proj.bias"]
    up = x @ w["up_proj.weight"].T + w["up_proj.bias"]
    return encode(gate / (1 + (-gate).exp()) * up) @ w["down_proj.weight"].T + w["down_proj.bias"]


def test_the_layer_is_swiglu_with_and_without_spikes() -> None:
    config = tiny_config(mixers="_", ffns="d", ffn_bias=True)
    spiking = SpikingConfig(neuron=NeuronKind.adaptive)
    ffn = tiny_model(config, spiking=spiking).blocks[0].ffn
    w = {name: parameter.detach() for name, parameter in ffn.named_parameters()}
    x = torch.randn(2, 5, 24, dtype=torch.float64)

    def spiked(value: torch.Tensor) -> torch.Tensor:
        threshold = value.abs().mean(dim=-1, keepdim=True) / 2.5
        return threshold * torch.round(value / threshold)

    assert_close(ffn(x), _by_formula(w, x, None), relative=1e-13)
    out = ffn(x, Spikes(k=2.5))
    assert_close(out, _by_formula(w, x, spiked), relative=1e-12)
