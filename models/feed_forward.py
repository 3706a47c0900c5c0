"""The dense feed-forward layer: SwiGLU with its two spiking encodings."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import Parts
from models.recompute import recomputed
from models.spiking.neurons import Spikes, encode


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))`; gate and up share one encoding of x."""

    def __init__(self, parts: Parts, *, layer: int) -> None:
        super().__init__()
        config, layers = parts.config, parts.layers
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.ffn_bias
        self.layer = layer
        self.gate_proj = layers.column_linear(hidden, inner, bias=bias)
        self.up_proj = layers.column_linear(hidden, inner, bias=bias)
        self.down_proj = layers.row_linear(inner, hidden, bias=bias)
        self.in_neuron = parts.build_neuron(layers.whole_channels)
        self.out_neuron = parts.build_neuron(layers.cut_channels)
        self._enter = layers.enter
        self._norms_again = layer in parts.recompute.norms
        self._activations_again = layer in parts.recompute.activations

    def forward(self, x: Tensor, spikes: Spikes | None = None) -> Tensor:
        """Map `[B, T, D]` to `[B, T, D]`."""
        gate, up = self._project(x, spikes)
        again = self._activations_again
        with recomputed(self._activate, gate, up, spikes, when=again) as inner:
            out: Tensor = self.down_proj(inner)
        return out

    def enter(self, x: Tensor, spikes: Spikes | None) -> Tensor:
        """Spiked x of the residual stream, as gate and up projections need it."""
        return self._enter(encode(self.in_neuron, x, spikes, f"{self.layer}/ffn_in"))

    def _project(self, x: Tensor, spikes: Spikes | None) -> tuple[Tensor, Tensor]:
        with recomputed(self.enter, x, spikes, when=self._norms_again) as entered:
            return self.gate_proj(entered), self.up_proj(entered)

    def _activate(self, gate: Tensor, up: Tensor, spikes: Spikes | None) -> Tensor:
        return encode(self.out_neuron, F.silu(gate) * up, spikes, f"{self.layer}/ffn_out")
