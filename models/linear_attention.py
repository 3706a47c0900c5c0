"""The gated linear mixer (`L`): ReLU feature map, low-rank gate, head norm, constant-size state.

SpikingBrain report, equations 10-11 and section 3.1. No rotary positions: decays carry position.
Shape letters: B batch, T tokens, D hidden, N query heads, G key-value heads, H head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import Parts
from models.norm import RMSNorm
from models.projections import HeadNorms, HeadProjections, Heads
from models.recompute import recomputed
from models.sequence import SequenceContext
from models.spiking.neurons import Spikes

_Operands = tuple[Heads, Tensor, HeadNorms, nn.Module]
"""Heads, low-rank gate `[B, T, rank]`, norms of queries and keys, the gate's second half."""


class GatedLinearAttention(HeadProjections):
    """Linear attention with one decay per key channel of each key-value head."""

    def __init__(self, parts: Parts, *, layer: int) -> None:
        super().__init__(parts, layer=layer)
        config, gate = parts.config, parts.config.linear
        keys = config.num_key_value_heads * config.head_dim
        rank = gate.gate_low_rank_dim
        self.gate_logit_normalizer = gate.gate_logit_normalizer
        self.gate_down = parts.layers.replicated_linear(config.hidden_size, rank, bias=False)
        self.gate_up = parts.layers.column_linear(rank, keys, bias=True)
        self.head_norm = RMSNorm(config.head_dim, gate.norm_eps)
        self._kernel = parts.kernels.linear_attention

    def forward(self, x: Tensor, sequence: SequenceContext, spikes: Spikes | None = None) -> Tensor:
        """Mix `[B, T, D]` within documents."""
        mixer_again, operands = self._mixer_again, self._operands(x, spikes)
        again = mixer_again or self._norms_again
        with (
            recomputed(self._attend, *operands, sequence, when=mixer_again) as mixed,
            recomputed(self._encode, mixed, self.head_norm, spikes, when=again) as encoded,
        ):
            out: Tensor = self.o_proj(encoded)
        return out

    def attend(self, x: Tensor, sequence: SequenceContext, spikes: Spikes | None = None) -> Tensor:
        """Head outputs `[B, T, N, H]` before the head norm."""
        return self._attend(*self._operands(x, spikes), sequence)

    def extend(
        self, x: Tensor, state: Tensor | None, spikes: Spikes | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mix the next `[B, n, D]`; the state is `[B, G, H, H]` (key, value), at least float32."""
        heads, new_state = self._kernel(
            *self._kernel_inputs(*self._operands(x, spikes)),
            scale=self.scale,
            sequence=None,
            initial_state=state,
            output_final_state=True,
        )
        assert new_state is not None
        return self.combine(self.head_norm(heads), spikes), new_state

    def log_decay(self, x: Tensor) -> Tensor:
        """Natural log of the decays `[B, T, G, H]`, at most 0, in at least float32."""
        return self._log_decay(self.gate_down(_widened(x)), self.gate_up)

    def _operands(self, x: Tensor, spikes: Spikes | None) -> _Operands:
        """Projections of x, and the modules that go on with them."""
        again = self._norms_again
        with recomputed(self.enter, x, spikes, when=again) as entered:
            heads = self.heads(entered)
            with recomputed(_widened, entered, when=again) as wide:
                return heads, self.gate_down(wide), self.head_norms, self.gate_up

    def _attend(
        self,
        heads: Heads,
        low_rank: Tensor,
        norms: HeadNorms,
        gate_up: nn.Module,
        sequence: SequenceContext,
    ) -> Tensor:
        inputs = self._kernel_inputs(heads, low_rank, norms, gate_up)
        return self._kernel(*inputs, scale=self.scale, sequence=sequence)[0]

    def _kernel_inputs(
        self, heads: Heads, low_rank: Tensor, norms: HeadNorms, gate_up: nn.Module
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, k, v = self.norm_heads(heads, norms)
        return torch.relu(q), torch.relu(k), v, self._log_decay(low_rank, gate_up)

    def _log_decay(self, low_rank: Tensor, gate_up: nn.Module) -> Tensor:
        return self._heads(F.logsigmoid(gate_up(low_rank)) / self.gate_logit_normalizer)

    def _encode(self, mixed: Tensor, head_norm: nn.Module, spikes: Spikes | None) -> Tensor:
        return self.encode_heads(head_norm(mixed), spikes)


def _widened(x: Tensor) -> Tensor:
    """As the gate reads it: in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
