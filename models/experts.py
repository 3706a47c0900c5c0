"""The routed experts of one layer: SwiGLUs whose rows come sorted by expert.

Which token visits which expert is `models.mixture_of_experts`'; how a product over sorted rows is
computed `models.grouped_linear`'s.

Shape letters: M rows, E experts, D hidden, F inner channels.
"""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn

from models.grouped_linear import GroupedLinear, Groups
from models.recompute import recomputed
from models.spiking.neurons import Spikes, encode


class Experts(nn.Module):
    """`down(silu(gate(x)) * up(x))` with each row's own expert; `[E, F, D]` and `[E, D, F]`.

    Args:
        num_experts: held here.
        hidden_size: D.
        inner_size: F, of this rank.
        neuron: spikes the inner channels; None does not.
        layer: of the whole model.
        activations_again: whether what the down projection reads is computed again in the backward
            pass.
    """

    sends_spikes = False
    """Whether rows are to come with what they are multiples of."""

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        inner_size: int,
        *,
        neuron: nn.Module | None,
        layer: int,
        activations_again: bool,
    ) -> None:
        super().__init__()
        self.gate_proj = GroupedLinear(num_experts, hidden_size, inner_size)
        self.up_proj = GroupedLinear(num_experts, hidden_size, inner_size)
        self.down_proj = GroupedLinear(num_experts, inner_size, hidden_size)
        self.out_neuron = neuron
        self._site = f"{layer}/expert_out"
        self._activations_again = activations_again

    def forward(self, x: Tensor, groups: Groups, spikes: Spikes | None = None) -> Tensor:
        """Map rows `[M, D]` to `[M, D]`; a sum over ranks is still to come where F is cut."""
        gate, up = self.gate_proj(x, groups), self.up_proj(x, groups)
        again = self._activations_again
        with recomputed(self._activate, gate, up, groups, spikes, when=again) as inner:
            out: Tensor = self.down_proj(inner, groups)
        return out

    def _activate(self, gate: Tensor, up: Tensor, groups: Groups, spikes: Spikes | None) -> Tensor:
        inner = F.silu(gate) * up
        if groups.is_real is not None and spikes is not None and spikes.recorder is not None:
            # Rows that only fill up are no statistics. Nothing here is kept for the backward pass.
            encode(self.out_neuron, inner.detach()[groups.is_real], spikes, self._site)
            spikes = replace(spikes, recorder=None)
        return encode(self.out_neuron, inner, spikes, self._site)
