"""The core of the gated linear mixer (`L`): feature map, gate, kernel, constant-size state.

SpikingBrain report, equations 10-11 and sections 2.2 and 3.1. No rotary positions: decays carry
position. Shape letters: B batch, T tokens, D hidden, N query heads, G key-value heads, H head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import Parts
from models.mixer_core import MixerCore, Operands
from models.norm import RMSNorm
from models.projections import Heads, as_heads
from models.recompute import recomputed
from models.sequence import SequenceContext


class GatedLinearAttention(MixerCore):
    """Linear attention with one decay per key channel of each key-value head."""

    def __init__(self, parts: Parts, *, layer: int) -> None:
        super().__init__()
        config, gate = parts.config, parts.config.linear
        keys = config.num_key_value_heads * config.head_dim
        rank = gate.gate_low_rank_dim
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        self.gate_logit_normalizer = gate.gate_logit_normalizer
        self.gate_down = parts.layers.replicated_linear(config.hidden_size, rank, bias=False)
        self.gate_up = parts.layers.column_linear(rank, keys, bias=True)
        self.head_norm = RMSNorm(config.head_dim, gate.norm_eps)
        self._kernel = parts.kernels.linear_attention
        self._norms_again = layer in parts.recompute.norms

    def operands(self, entered: Tensor, sequence: SequenceContext) -> Operands:
        """The low-rank gate, and the module that goes on with it."""
        return self._gate(entered)

    def attend(self, heads: Heads, operands: Operands, sequence: SequenceContext) -> Tensor:
        """Head outputs `[B, T, N, H]` before `head_norm`."""
        inputs = self._kernel_inputs(heads, operands)
        return self._kernel(*inputs, scale=self.scale, sequence=sequence)[0]

    def extend(self, heads: Heads, entered: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `attend`; the state is `[B, G, H, H]` (key, value), at least float32."""
        mixed, new_state = self._kernel(
            *self._kernel_inputs(heads, self._gate(entered)),
            scale=self.scale,
            sequence=None,
            initial_state=state,
            output_final_state=True,
        )
        assert new_state is not None
        return mixed, new_state

    def log_decay(self, heads: Heads, entered: Tensor) -> Tensor:
        """Natural log of the decays `[B, T, G, H]`, at most 0, in at least float32."""
        return self._kernel_inputs(heads, self._gate(entered))[3]

    def _gate(self, entered: Tensor) -> Operands:
        with recomputed(_widened, entered, when=self._norms_again) as wide:
            return self.gate_down(wide), self.gate_up

    def _kernel_inputs(
        self, heads: Heads, operands: Operands
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, k, v = heads
        low_rank, gate_up = operands
        return torch.relu(q), torch.relu(k), v, self._log_decay(low_rank, gate_up)

    def _log_decay(self, low_rank: Tensor, gate_up: nn.Module) -> Tensor:
        log_gate = F.logsigmoid(gate_up(low_rank)) / self.gate_logit_normalizer
        return as_heads(log_gate, self.head_dim)


def _widened(x: Tensor) -> Tensor:
    """As the gate reads it: in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
