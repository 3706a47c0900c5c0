"""The dense feed-forward layer: SwiGLU with its two spiking encodings."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import Parts
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

    def forward(self, x: Tensor, spikes: Spikes | None = None) -> Tensor:
        """Map `[B, T, D]` to `[B, T, D]`."""
        x = self._enter(encode(self.in_neuron, x, spikes, f"{self.layer}/ffn_in"))
        inner = F.silu(self.gate_proj(x)) * self.up_proj(x)
        out: Tensor = self.down_proj(
            encode(self.out_neuron, inner, spikes, f"{self.layer}/ffn_out")
        )
        return out
