"""The q, k, v and output projections around the core of any mixer.

What the softmax and the linear mixer share, so that conversion can reuse the weights as they are.
Shape letters: B batch, T tokens, D hidden, N query heads, G key-value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from models.layers import Parts
from models.norm import RMSNorm
from models.spiking.neurons import Spikes, encode

Heads = tuple[Tensor, Tensor, Tensor]
"""Queries `[B, T, N, H]`, keys and values `[B, T, G, H]`."""
Norm = Callable[[Tensor], Tensor]
HeadNorms = tuple[Norm | None, Norm | None]
"""Of queries and of keys."""


class HeadProjections(nn.Module):
    """Projects to heads and back."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        config, layers = parts.config, parts.layers
        self.head_dim = config.head_dim
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
        self.out_neuron = parts.build_neuron(layers.cut_channels)

    def project(self, entered: Tensor) -> Heads:
        """Heads of entered `[B, T, D]`, queries and keys normed where the model does so."""
        return self.norm_heads(self.heads(entered), self.head_norms)

    def heads(self, entered: Tensor) -> Heads:
        """The same before the norms."""
        q, k, v = self.q_proj(entered), self.k_proj(entered), self.v_proj(entered)
        return as_heads(q, self.head_dim), as_heads(k, self.head_dim), as_heads(v, self.head_dim)

    @property
    def head_norms(self) -> HeadNorms:
        """What `norm_heads` is given: apart from it, so that hooks run in forward passes only."""
        return self.q_norm, self.k_norm

    @staticmethod
    def norm_heads(heads: Heads, norms: HeadNorms) -> Heads:
        """Heads with normed queries and keys."""
        (q, k, v), (q_norm, k_norm) = heads, norms
        if q_norm is not None and k_norm is not None:
            q, k = q_norm(q), k_norm(k)
        return q, k, v

    def encode_heads(self, heads: Tensor, spikes: Spikes | None, site: str) -> Tensor:
        """Head outputs `[B, T, N, H]` as the output projection reads them `[B, T, N * H]`."""
        return encode(self.out_neuron, heads.flatten(2), spikes, site)


def as_heads(flat: Tensor, head_dim: int) -> Tensor:
    """Channels `[B, T, heads * H]` as `[B, T, heads, H]`."""
    return flat.view(*flat.shape[:-1], -1, head_dim)
