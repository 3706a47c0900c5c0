"""A mixer: projections around a core, or around two parallel ones (`X+Y`), in one order of steps.

The input is spiked once. Then, for each branch: projections to heads, norms of queries and keys,
the core, its head norm. Heads are spiked again where an output projection reads them. Branches meet
in one of two places (`models.mixer_config.BranchNorm`):

- before the output projection: heads are normed, weighed and added. Where projections are separate
  each branch has its own, and their outputs are added;
- after it: each branch's projected output is normed, weighed and added.

Owns that order and what of it is computed again in the backward pass. Shape letters: B batch, T
tokens, n new tokens, D hidden, N query heads, H head dim.
"""

from __future__ import annotations

from torch import Tensor, nn

from models.layer_pattern import Mixers
from models.layers import Parts
from models.mixer_config import BranchNorm
from models.mixer_core import Operands
from models.parallel_branches import (
    BranchWeights,
    Norms,
    add,
    build_branches,
    normed_and_weighed,
)
from models.projections import HeadNorms, HeadProjections, Heads
from models.recompute import recomputed
from models.sequence import SequenceContext
from models.softmax_attention import KeyValueCache
from models.spiking.neurons import Spikes, encode

BranchState = KeyValueCache | Tensor | None
"""What a core remembers while decoding: a cache (F, S) or a matrix state (L); None at the start."""
MixerState = BranchState | tuple[BranchState, ...]
"""What a mixer remembers: its core's state, or one a branch."""


class Mixer(nn.Module):
    """The mixer of one layer; `layer` is the block's index, for spike statistics."""

    def __init__(self, parts: Parts, mixers: Mixers, *, layer: int) -> None:
        super().__init__()
        config = parts.config.branches
        self.layer = layer
        self.in_neuron = parts.build_neuron(parts.layers.whole_channels)
        self.branches = build_branches(self, parts, mixers, layer)
        self.merge = BranchWeights(config.merge, len(mixers)) if len(mixers) > 1 else None
        self._merges_heads = config.norm is BranchNorm.before_output
        # Shared ones once.
        self._projections = tuple(dict.fromkeys(branch.projections for branch in self.branches))
        self._enter = parts.layers.enter
        self._norms_again = layer in parts.recompute.norms
        self._mixer_again = layer in parts.recompute.mixers

    def forward(self, x: Tensor, sequence: SequenceContext, spikes: Spikes | None = None) -> Tensor:
        """Mix `[B, T, D]` within documents."""
        mixing = (self._attend, *self._operands(x, sequence, spikes), sequence)
        norms, weights = self._head_norms, self._head_weights
        encodes_again = self._mixer_again or (self._norms_again and any(norms))
        with (
            recomputed(*mixing, when=self._mixer_again) as mixed,
            recomputed(self._encode, mixed, norms, weights, spikes, when=encodes_again) as encoded,
        ):
            outputs = self._project_back(encoded)
        return self._join(outputs)

    def extend(
        self, x: Tensor, state: MixerState, spikes: Spikes | None = None
    ) -> tuple[Tensor, MixerState]:
        """Mix the next `[B, n, D]` after what `state` holds, which may be changed in place."""
        entered = self.enter(x, spikes)
        heads = self._of_each_branch(tuple(each.project(entered) for each in self._projections))
        states = state if isinstance(state, tuple) else (state,) * len(self.branches)
        mixed, after = [], []
        for branch, own, before in zip(self.branches, heads, states, strict=True):
            out, new = branch.core.extend(own, entered, before)
            mixed.append(out)
            after.append(new)
        encoded = self._encode(tuple(mixed), self._head_norms, self._head_weights, spikes)
        out = self._join(self._project_back(encoded))
        return out, tuple(after) if len(after) > 1 else after[0]

    def attend(
        self, x: Tensor, sequence: SequenceContext, spikes: Spikes | None = None
    ) -> tuple[Tensor, ...]:
        """Head outputs `[B, T, N, H]` of each branch before its head norm."""
        return self._attend(*self._operands(x, sequence, spikes), sequence)

    def enter(self, x: Tensor, spikes: Spikes | None) -> Tensor:
        """Spiked x of the residual stream, as the projections of this rank's heads need it."""
        return self._enter(encode(self.in_neuron, x, spikes, f"{self.layer}/mixer_in"))

    def _operands(
        self, x: Tensor, sequence: SequenceContext, spikes: Spikes | None
    ) -> tuple[tuple[Heads, ...], tuple[HeadNorms, ...], tuple[Operands, ...]]:
        """Heads of each projection and their norms; what each core needs besides."""
        with recomputed(self.enter, x, spikes, when=self._norms_again) as entered:
            heads = tuple(each.heads(entered) for each in self._projections)
            extra = tuple(each.core.operands(entered, sequence) for each in self.branches)
        return heads, tuple(each.head_norms for each in self._projections), extra

    def _attend(
        self,
        heads: tuple[Heads, ...],
        norms: tuple[HeadNorms, ...],
        operands: tuple[Operands, ...],
        sequence: SequenceContext,
    ) -> tuple[Tensor, ...]:
        normed = self._of_each_branch(tuple(map(HeadProjections.norm_heads, heads, norms)))
        each = zip(self.branches, normed, operands, strict=True)
        return tuple(branch.core.attend(own, extra, sequence) for branch, own, extra in each)

    def _encode(
        self,
        mixed: tuple[Tensor, ...],
        norms: Norms,
        weights: BranchWeights | None,
        spikes: Spikes | None,
    ) -> tuple[Tensor, ...]:
        """What output projections read `[B, T, N * H]`: of each branch, or of heads that met."""
        heads, sites = normed_and_weighed(mixed, norms, weights), self._sites
        if len(sites) == 1:
            heads = (add(heads),)
        return tuple(
            branch.projections.encode_heads(x.to(mixed[0].dtype), spikes, site)
            for branch, x, site in zip(self.branches, heads, sites, strict=False)
        )

    def _project_back(self, encoded: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Through output projections `[B, T, D]`; heads that met need only one."""
        pairs = zip(self.branches, encoded, strict=False)
        return tuple(branch.projections.o_proj(x) for branch, x in pairs)

    def _join(self, outputs: tuple[Tensor, ...]) -> Tensor:
        if self.merge is None or self._merges_heads:
            return add(outputs)
        norms, again = tuple(branch.output_norm for branch in self.branches), self._norms_again
        with recomputed(_sum_of_normed, outputs, norms, self.merge, when=again) as out:
            return out

    def _of_each_branch(self, heads: tuple[Heads, ...]) -> tuple[Heads, ...]:
        """Of the projections that each branch reads."""
        return heads * (len(self.branches) // len(heads))

    @property
    def _head_norms(self) -> Norms:
        return tuple(branch.core.head_norm for branch in self.branches)

    @property
    def _head_weights(self) -> BranchWeights | None:
        """What weighs heads, where branches meet before the output projection."""
        return self.merge if self._merges_heads else None

    @property
    def _sites(self) -> list[str]:
        """Where spikes enter output projections, for statistics."""
        site = f"{self.layer}/mixer_out"
        if len(self._projections) == 1 and (self._merges_heads or len(self.branches) == 1):
            return [site]
        return [f"{site}_{branch.kind.name}" for branch in self.branches]


def _sum_of_normed(
    outputs: tuple[Tensor, ...], norms: Norms, weights: BranchWeights | None
) -> Tensor:
    return add(normed_and_weighed(outputs, norms, weights)).to(outputs[0].dtype)
