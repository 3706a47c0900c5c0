"""The core of the gated linear mixer (`L`): feature map, gate, kernel, constant-size state.

SpikingBrain report, equations 10-11 and sections 2.2 and 3.1. No rotary positions: decays carry
position. They come from low-rank matrices of their own, or with a key-tied gate from the keys.
Shape letters: B batch, T tokens, S sinks, D hidden, N query heads, G key-value heads, H head dim.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import Parts
from models.mixer_config import FeatureMap, GateKind
from models.mixer_core import MixerCore, Operands, SinkMemory
from models.norm import RMSNorm
from models.projections import Heads, as_heads
from models.recompute import recomputed, unobserved
from models.sequence import SequenceContext

_FEATURE_MAPS = {FeatureMap.relu: torch.relu, FeatureMap.sigmoid: torch.sigmoid}


class GatedLinearAttention(MixerCore):
    """Linear attention with one decay per key channel of each key-value head."""

    def __init__(self, parts: Parts, *, layer: int) -> None:
        super().__init__()
        config, linear = parts.config, parts.config.linear
        self.config = linear
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        self.gate_down: nn.Module | None = None
        self.gate_up: nn.Module | None = None
        if linear.gate is GateKind.low_rank:
            rank, keys = linear.gate_low_rank_dim, config.num_key_value_heads * config.head_dim
            self.gate_down = parts.layers.replicated_linear(config.hidden_size, rank, bias=False)
            self.gate_up = parts.layers.column_linear(rank, keys, bias=True)
        self.head_norm = RMSNorm(config.head_dim, linear.norm_eps)
        self.has_sinks = config.sinks.through_linear
        self._kernel = parts.kernels.linear_attention
        self._norms_again = layer in parts.recompute.norms

    def operands(self, entered: Tensor, sequence: SequenceContext) -> Operands:
        """The low-rank gate and the module that goes on with it; nothing for a key-tied gate."""
        return self._gate(entered)

    def sink_operands(self, entered: Tensor) -> Operands:
        """The same for sinks."""
        if self.gate_down is None:
            return ()
        gate_down, gate_up = unobserved((self.gate_down, self.gate_up))
        return gate_down(_widened(entered)), gate_up

    def attend(
        self,
        heads: Heads,
        operands: Operands,
        sequence: SequenceContext,
        sinks: SinkMemory = None,
    ) -> Tensor:
        """Head outputs `[B, T, N, H]` before `head_norm`."""
        assert sinks is None or isinstance(sinks, Tensor)
        inputs = self._kernel_inputs(heads, operands)
        return self._kernel(*inputs, scale=self.scale, sequence=sequence, document_state=sinks)[0]

    def attend_sinks(self, heads: Heads, operands: Operands) -> tuple[Tensor, SinkMemory]:
        """Head outputs `[1, S, N, H]` of sinks in order, and their state `[G, H, H]`."""
        inputs = self._kernel_inputs(heads, operands)
        mixed, state = self._kernel(
            *inputs, scale=self.scale, sequence=None, output_final_state=True
        )
        assert state is not None
        return mixed, state[0]

    def begin(self, sinks: SinkMemory) -> Tensor | None:
        """The state that a document starts from, `[1, G, H, H]`."""
        return sinks[None] if isinstance(sinks, Tensor) else None

    def extend(self, heads: Heads, entered: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `attend`; the state is `[B or 1, G, H, H]` (key, value), at least float32."""
        if state is not None:
            state = state.expand(heads[0].shape[0], -1, -1, -1)
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
        if self.gate_down is None:
            return ()
        with recomputed(_widened, entered, when=self._norms_again) as wide:
            return self.gate_down(wide), self.gate_up

    def _kernel_inputs(
        self, heads: Heads, operands: Operands
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, k, v = heads
        feature_map = _FEATURE_MAPS[self.config.feature_map]
        if not operands:
            k, log_decay = key_tied_gate(
                k, offset=self.config.gate_offset, floor=self.config.gate_floor
            )
            return feature_map(q), k, v, log_decay
        low_rank, gate_up = operands
        log_gate = F.logsigmoid(gate_up(low_rank)) / self.config.gate_logit_normalizer
        return feature_map(q), feature_map(k), v, as_heads(log_gate, self.head_dim)


def key_tied_gate(keys: Tensor, *, offset: float, floor: float) -> tuple[Tensor, Tensor]:
    """Keys between 0 and 1, and the log of the decay that is 1 minus the key.

    Of u, the projected keys less the offset, in at least float32, and the floor lb: the key is `(1
    - lb) sigmoid(u)`, the decay `lb + (1 - lb) sigmoid(-u)`. Its logarithm comes from u, not from
    the key, which rounds to 1 where the decay is still far from 0.

    Returns:
        Keys in their dtype, log decays in at least float32.
    """
    u = _widened(keys)
    u = u - offset if offset else u
    log_decay = F.logsigmoid(-u)
    key = torch.sigmoid(u)
    if floor:
        key = (1 - floor) * key
        log_floor = log_decay.new_full((), math.log(floor))
        log_decay = torch.logaddexp(log_decay + math.log1p(-floor), log_floor)
    return key.to(keys.dtype), log_decay


def _widened(x: Tensor) -> Tensor:
    """As the gate reads it: in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
