"""The dense feed-forward layer: SwiGLU with its two spiking encodings."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import Parts
from models.recompute import recomputed
from models.spiking.neurons import Spikes, encode


class SwiGLUProjections(nn.Module):
    """`down(silu(gate(x)) * up(x))` of x that has entered the region of its linears.

    `inner_again` computes everything again that the down projection reads.
    """

    def __init__(
        self,
        parts: Parts,
        *,
        layer: int,
        inner_size: int,
        activations_again: bool,
        inner_again: bool = False,
    ) -> None:
        super().__init__()
        config, layers = parts.config, parts.layers
        hidden, bias = config.hidden_size, config.ffn_bias
        self.layer = layer
        self.gate_proj = layers.column_linear(hidden, inner_size, bias=bias)
        self.up_proj = layers.column_linear(hidden, inner_size, bias=bias)
        self.down_proj = layers.row_linear(inner_size, hidden, bias=bias)
        self.out_neuron = parts.build_neuron(layers.cut_channels)
        self._activations_again, self._inner_again = activations_again, inner_again

    def forward(self, entered: Tensor, spikes: Spikes | None = None) -> Tensor:
        """Map all tokens `[B, T, D]` to the residual stream."""
        if not self._inner_again:
            return self._finish(*self._channels(entered), spikes)
        with recomputed(self._inner, entered, spikes) as inner:
            out: Tensor = self.down_proj(inner)
        return out

    def _inner(self, entered: Tensor, spikes: Spikes | None) -> Tensor:
        return self._activate(*self._channels(entered), spikes)

    def _channels(self, entered: Tensor) -> tuple[Tensor, Tensor]:
        """Gate and up channels."""
        return self.gate_proj(entered), self.up_proj(entered)

    def _finish(self, gate: Tensor, up: Tensor, spikes: Spikes | None) -> Tensor:
        """From gate and up channels to the residual stream."""
        again = self._activations_again
        with recomputed(self._activate, gate, up, spikes, when=again) as inner:
            out: Tensor = self.down_proj(inner)
        return out

    def _activate(self, gate: Tensor, up: Tensor, spikes: Spikes | None) -> Tensor:
        return encode(self.out_neuron, F.silu(gate) * up, spikes, f"{self.layer}/ffn_out")


class SwiGLU(SwiGLUProjections):
    """The dense layer; gate and up share one encoding of x."""

    def __init__(self, parts: Parts, *, layer: int) -> None:
        super().__init__(
            parts,
            layer=layer,
            inner_size=parts.config.intermediate_size,
            activations_again=layer in parts.recompute.activations,
        )
        self.in_neuron = parts.build_neuron(parts.layers.whole_channels)
        self._enter = parts.layers.enter
        self._norms_again = layer in parts.recompute.norms

    def forward(self, x: Tensor, spikes: Spikes | None = None) -> Tensor:
        """Map `[B, T, D]` of the residual stream to the same."""
        return self._finish(*self._project(x, spikes), spikes)

    def enter(self, x: Tensor, spikes: Spikes | None) -> Tensor:
        """Spiked x of the residual stream, as gate and up projections need it."""
        return self._enter(encode(self.in_neuron, x, spikes, f"{self.layer}/ffn_in"))

    def _project(self, x: Tensor, spikes: Spikes | None) -> tuple[Tensor, Tensor]:
        with recomputed(self.enter, x, spikes, when=self._norms_again) as entered:
            return self._channels(entered)
