"""A mixer: projections around a core, from the residual stream to the residual stream.

Owns the order of things: encoding, projections, norms of queries and keys, the core, its head norm,
encoding again, output projection; and which of it is computed again in the backward pass.
Shape letters: B batch, T tokens, n new tokens, D hidden, N query heads, G key-value heads, H head
dim.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from models.layer_pattern import MixerKind, Mixers
from models.layers import Parts
from models.linear_attention import GatedLinearAttention
from models.mixer_core import MixerCore, Operands
from models.norm import RMSNorm
from models.projections import HeadNorms, HeadProjections, Heads
from models.recompute import recomputed
from models.sequence import SequenceContext
from models.softmax_attention import KeyValueCache, SoftmaxAttention
from models.spiking.neurons import Spikes, encode

MixerState = KeyValueCache | Tensor | None
"""What a mixer remembers while decoding: a cache (F, S), a matrix state (L), nothing (`_`)."""


@dataclass(frozen=True, slots=True)
class Branch:
    """A core between projections. Their submodules are the mixer's own."""

    kind: MixerKind
    projections: HeadProjections
    core: MixerCore


class Mixer(nn.Module):
    """The mixer of one layer; `layer` is the block's index, for spike statistics."""

    def __init__(self, parts: Parts, mixers: Mixers, *, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.in_neuron = parts.build_neuron(parts.layers.whole_channels)
        projections, core = HeadProjections(parts), _core(parts, mixers[0], layer)
        adopt(self, projections)
        adopt(self, core)
        self.branches = (Branch(mixers[0], projections, core),)
        self._enter = parts.layers.enter
        self._norms_again = layer in parts.recompute.norms
        self._mixer_again = layer in parts.recompute.mixers

    def forward(self, x: Tensor, sequence: SequenceContext, spikes: Spikes | None = None) -> Tensor:
        """Mix `[B, T, D]` within documents."""
        heads, operands = self._project(x, sequence, spikes)
        (branch,) = self.branches
        norms, head_norm = branch.projections.head_norms, branch.core.head_norm
        encodes_again = self._mixer_again or (self._norms_again and head_norm is not None)
        with (
            recomputed(
                self._attend, heads, norms, operands, sequence, when=self._mixer_again
            ) as mixed,
            recomputed(self._encode, mixed, head_norm, spikes, when=encodes_again) as encoded,
        ):
            out: Tensor = branch.projections.o_proj(encoded)
        return out

    def extend(
        self, x: Tensor, state: MixerState, spikes: Spikes | None = None
    ) -> tuple[Tensor, MixerState]:
        """Mix the next `[B, n, D]` after what `state` holds, which may be changed in place."""
        (branch,) = self.branches
        entered = self.enter(x, spikes)
        mixed, state = branch.core.extend(branch.projections.project(entered), entered, state)
        out: Tensor = branch.projections.o_proj(self._encode(mixed, branch.core.head_norm, spikes))
        return out, state

    def attend(
        self, x: Tensor, sequence: SequenceContext, spikes: Spikes | None = None
    ) -> tuple[Tensor, ...]:
        """Head outputs `[B, T, N, H]` of each branch before its head norm."""
        heads, operands = self._project(x, sequence, spikes)
        return (self._attend(heads, self.branches[0].projections.head_norms, operands, sequence),)

    def enter(self, x: Tensor, spikes: Spikes | None) -> Tensor:
        """Spiked x of the residual stream, as the projections of this rank's heads need it."""
        return self._enter(encode(self.in_neuron, x, spikes, f"{self.layer}/mixer_in"))

    def _project(
        self, x: Tensor, sequence: SequenceContext, spikes: Spikes | None
    ) -> tuple[Heads, Operands]:
        (branch,) = self.branches
        with recomputed(self.enter, x, spikes, when=self._norms_again) as entered:
            return branch.projections.heads(entered), branch.core.operands(entered, sequence)

    def _attend(
        self, heads: Heads, norms: HeadNorms, operands: Operands, sequence: SequenceContext
    ) -> Tensor:
        (branch,) = self.branches
        return branch.core.attend(branch.projections.norm_heads(heads, norms), operands, sequence)

    def _encode(self, mixed: Tensor, head_norm: RMSNorm | None, spikes: Spikes | None) -> Tensor:
        heads = mixed if head_norm is None else head_norm(mixed)
        (branch,) = self.branches
        return branch.projections.encode_heads(heads, spikes, f"{self.layer}/mixer_out")


def adopt(owner: nn.Module, part: nn.Module) -> None:
    """Make the submodules of `part` those of `owner`, so that parameters are named after it."""
    for name, child in part.named_children():
        owner.add_module(name, child)


def _core(parts: Parts, kind: MixerKind, layer: int) -> MixerCore:
    if kind is MixerKind.linear:
        return GatedLinearAttention(parts, layer=layer)
    return SoftmaxAttention(parts, kind=kind)
