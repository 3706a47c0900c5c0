"""The q, k, v and output projections around any mixer, with their spiking encodings.

What the softmax and the linear mixer share, so that conversion can reuse the weights as they are.
Shape letters: B batch, T tokens, D hidden, N query heads, G key-value heads, H head dim.
"""

from __future__ import annotations

from torch import Tensor, nn

from models.layers import Parts
from models.norm import RMSNorm
from models.spiking.neurons import Spikes, encode


class HeadProjections(nn.Module):
    """Projects to heads and back; `layer` is the block's index, for spike statistics."""

    def __init__(self, parts: Parts, *, layer: int) -> None:
        super().__init__()
        config, layers = parts.config, parts.layers
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        self.layer = layer
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        hidden = config.hidden_size
        self.q_proj = layers.column_linear(hidden, queries, bias=config.qkv_bias)
        self.k_proj = layers.column_linear(hidden, keys, bias=config.qkv_bias)
        self.v_proj = layers.column_linear(hidden, keys, bias=config.qkv_bias)
        self.o_proj = layers.row_linear(queries, hidden, bias=config.output_bias)
        has_norm = config.qk_norm
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if has_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if has_norm else None
        self.in_neuron = parts.build_neuron(layers.whole_channels)
        self.out_neuron = parts.build_neuron(layers.cut_channels)
        self._enter = layers.enter

    def enter(self, x: Tensor, spikes: Spikes | None) -> Tensor:
        """Spiked x of the residual stream, as the projections of this rank's heads need it."""
        return self._enter(encode(self.in_neuron, x, spikes, f"{self.layer}/mixer_in"))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[B, T, N, H]`, keys and values `[B, T, G, H]` of entered x `[B, T, D]`."""
        q = self._heads(self.q_proj(x))
        k = self._heads(self.k_proj(x))
        v = self._heads(self.v_proj(x))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def combine(self, heads: Tensor, spikes: Spikes | None) -> Tensor:
        """Project head outputs `[B, T, N, H]` back to `[B, T, D]`."""
        encoded = encode(self.out_neuron, heads.flatten(2), spikes, f"{self.layer}/mixer_out")
        out: Tensor = self.o_proj(encoded)
        return out

    def _heads(self, flat: Tensor) -> Tensor:
        return flat.view(*flat.shape[:-1], -1, self.head_dim)
