"""The gated linear mixer (`L`): ReLU feature map, low-rank gate, head norm, constant-size state.

SpikingBrain report, equations 10-11 and section 3.1. No rotary positions: decays carry position.
Shape letters: B batch, T tokens, D hidden, N query heads, G key-value heads, H head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.layers import Parts
from models.norm import RMSNorm
from models.projections import HeadProjections
from models.sequence import SequenceContext
from models.spiking.neurons import Spikes


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
        return self.combine(self.head_norm(self.attend(x, sequence, spikes)), spikes)

    def attend(self, x: Tensor, sequence: SequenceContext, spikes: Spikes | None = None) -> Tensor:
        """Head outputs `[B, T, N, H]` before the head norm."""
        return self._mix(x, spikes, sequence=sequence)[0]

    def extend(
        self, x: Tensor, state: Tensor | None, spikes: Spikes | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mix the next `[B, n, D]`; the state is `[B, G, H, H]` (key, value), at least float32."""
        heads, new_state = self._mix(x, spikes, state=state, output_final_state=True)
        assert new_state is not None
        return self.combine(self.head_norm(heads), spikes), new_state

    def log_decay(self, x: Tensor) -> Tensor:
        """Natural log of the decays `[B, T, G, H]`, at most 0, in at least float32."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        logits: Tensor = self.gate_up(self.gate_down(wide))
        return self._heads(F.logsigmoid(logits) / self.gate_logit_normalizer)

    def _mix(
        self,
        x: Tensor,
        spikes: Spikes | None,
        *,
        sequence: SequenceContext | None = None,
        state: Tensor | None = None,
        output_final_state: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        entered = self.enter(x, spikes)
        q, k, v = self.project(entered)
        return self._kernel(
            torch.relu(q),
            torch.relu(k),
            v,
            self.log_decay(entered),
            scale=self.scale,
            sequence=sequence,
            initial_state=state,
            output_final_state=output_final_state,
        )
