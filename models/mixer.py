"""A mixer: projections around a core, or around two parallel ones (`X+Y`), in one order of steps.

The input is spiked once. Then, for each branch: projections to heads, norms of queries and keys,
the core, its head norm. Heads are spiked again where an output projection reads them. Branches meet
in one of two places (`models.mixer_config.BranchNorm`):

- before the output projection: heads are normed, weighed and added. Where projections are separate
  each branch has its own, and their outputs are added;
- after it: each branch's projected output is normed, weighed and added.

Sinks go the same way beside the tokens, through the branches whose cores have them: a branch
without them is missing from their sum. Their few values are never computed again but for what the
tokens' mixer reads. Owns that order and what of it is computed again in the backward pass. Shape
letters: B batch, T tokens, S sinks, n new tokens, D hidden, N query heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from models.layer_pattern import Mixers
from models.layers import Parts
from models.mixer_config import BranchNorm
from models.mixer_core import Operands, SinkMemory
from models.parallel_branches import (
    BranchWeights,
    Norms,
    Places,
    Weigh,
    add,
    build_branches,
    normed_and_weighed,
)
from models.projections import HeadNorms, HeadProjections, Heads
from models.recompute import recomputed, unobserved
from models.sequence import SequenceContext
from models.softmax_attention import KeyValueCache
from models.spiking.neurons import Spikes, encode

BranchState = KeyValueCache | Tensor | None
"""What a core remembers while decoding: a cache (F, S) or a matrix state (L); None at the start."""
MixerState = BranchState | tuple[BranchState, ...]
"""What a mixer remembers: its core's state, or one a branch."""
Entered = tuple[tuple[Heads, ...], tuple[HeadNorms, ...], tuple[Operands, ...]]
"""A stream inside: heads of each projection and their norms, what each core needs besides."""


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
        self._places: Places = tuple(range(len(self.branches)))
        self._sink_places = tuple(i for i in self._places if self.branches[i].core.has_sinks)
        self._projections = self._projections_at(self._places)
        self._enter = parts.layers.enter
        self._norms_again = layer in parts.recompute.norms
        self._mixer_again = layer in parts.recompute.mixers

    def forward(
        self,
        x: Tensor,
        sequence: SequenceContext,
        spikes: Spikes | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Mix `[B, T, D]` within documents; with `sinks` `[1, S, D]` both, None if they pass by."""
        operands, of_sinks = self._operands(x, sequence, spikes), self._sink_operands(sinks, spikes)
        mixing = (self._attend, *operands, sequence, of_sinks)
        norms, weigh = self._head_norms(self._places), self._head_weights
        encodes_again = self._mixer_again or (self._norms_again and any(norms))
        with recomputed(*mixing, when=self._mixer_again) as both:
            mixed, sinks_mixed = both[: len(norms)], both[len(norms) :]
            sinks_out = self._finish_sinks(sinks_mixed, spikes)
            encoding = (self._encode, mixed, norms, weigh, spikes)
            with recomputed(*encoding, when=encodes_again) as encoded:
                outputs = self._project_back(encoded, self._places)
        out = self._join(outputs)
        return out if sinks is None else (out, sinks_out)

    def begin(
        self, sinks: Tensor, spikes: Spikes | None = None
    ) -> tuple[Tensor | None, MixerState]:
        """Mix sinks `[1, S, D]` alone, None if they pass by; and what `extend` starts from."""
        entered = self._sink_operands(sinks, spikes)
        mixed: tuple[Tensor, ...] = ()
        memories: tuple[SinkMemory, ...] = (None,) * len(self.branches)
        if entered is not None:
            mixed, memories = self._attend_sinks(*entered)
        pairs = zip(self.branches, memories, strict=True)
        states = tuple(branch.core.begin(memory) for branch, memory in pairs)
        return self._finish_sinks(mixed, spikes), states if len(states) > 1 else states[0]

    def extend(
        self, x: Tensor, state: MixerState, spikes: Spikes | None = None
    ) -> tuple[Tensor, MixerState]:
        """Mix the next `[B, n, D]` after what `state` holds, which may be changed in place."""
        entered = self.enter(x, spikes)
        heads = self._of_each_branch(
            tuple(each.project(entered) for each in self._projections), self._places
        )
        states = state if isinstance(state, tuple) else (state,) * len(self.branches)
        mixed, after = [], []
        for branch, own, before in zip(self.branches, heads, states, strict=True):
            out, new = branch.core.extend(own, entered, before)
            mixed.append(out)
            after.append(new)
        encoded = self._encode(
            tuple(mixed), self._head_norms(self._places), self._head_weights, spikes
        )
        out = self._join(self._project_back(encoded, self._places))
        return out, tuple(after) if len(after) > 1 else after[0]

    def attend(
        self, x: Tensor, sequence: SequenceContext, spikes: Spikes | None = None
    ) -> tuple[Tensor, ...]:
        """Head outputs `[B, T, N, H]` of each branch before its head norm."""
        return self._attend(*self._operands(x, sequence, spikes), sequence)

    def enter(self, x: Tensor, spikes: Spikes | None) -> Tensor:
        """Spiked x of the residual stream, as the projections of this rank's heads need it."""
        return self._enter(encode(self.in_neuron, x, spikes, f"{self.layer}/mixer_in"))

    def _operands(self, x: Tensor, sequence: SequenceContext, spikes: Spikes | None) -> Entered:
        with recomputed(self.enter, x, spikes, when=self._norms_again) as entered:
            heads = tuple(each.heads(entered) for each in self._projections)
            extra = tuple(each.core.operands(entered, sequence) for each in self.branches)
        return heads, tuple(each.head_norms for each in self._projections), extra

    def _sink_operands(self, sinks: Tensor | None, spikes: Spikes | None) -> Entered | None:
        """The same of the branches that sinks run through; None without sinks or such branches."""
        if sinks is None or not self._sink_places:
            return None
        entered = self.enter(sinks, unobserved(spikes))
        projections = self._projections_at(self._sink_places)
        heads = tuple(each.heads(entered) for each in projections)
        extra = tuple(self.branches[i].core.sink_operands(entered) for i in self._sink_places)
        return heads, unobserved(tuple(each.head_norms for each in projections)), extra

    def _attend(
        self,
        heads: tuple[Heads, ...],
        norms: tuple[HeadNorms, ...],
        operands: tuple[Operands, ...],
        sequence: SequenceContext,
        sinks: Entered | None = None,
    ) -> tuple[Tensor, ...]:
        """Head outputs of each branch, then those of sinks."""
        seen: tuple[Tensor, ...] = ()
        memories: tuple[SinkMemory, ...] = (None,) * len(self.branches)
        if sinks is not None:
            seen, memories = self._attend_sinks(*sinks)
        normed = self._normed(heads, norms, self._places)
        each = zip(self.branches, normed, operands, memories, strict=True)
        tokens = tuple(b.core.attend(own, extra, sequence, m) for b, own, extra, m in each)
        return tokens + seen

    def _attend_sinks(
        self,
        heads: tuple[Heads, ...],
        norms: tuple[HeadNorms, ...],
        operands: tuple[Operands, ...],
    ) -> tuple[tuple[Tensor, ...], tuple[SinkMemory, ...]]:
        """Head outputs of the branches with sinks, and what tokens see in each of all branches."""
        outputs: list[Tensor] = []
        memories: list[SinkMemory] = [None] * len(self.branches)
        normed = self._normed(heads, norms, self._sink_places)
        for place, own, extra in zip(self._sink_places, normed, operands, strict=True):
            out, memories[place] = self.branches[place].core.attend_sinks(own, extra)
            outputs.append(out)
        return tuple(outputs), tuple(memories)

    def _finish_sinks(self, mixed: tuple[Tensor, ...], spikes: Spikes | None) -> Tensor | None:
        """From head outputs of the branches with sinks to the residual stream."""
        if not mixed:
            return None
        places = self._sink_places
        norms, weigh = unobserved((self._head_norms(places), self.merge))
        if not self._merges_heads:
            weigh = None
        encoded = self._encode(mixed, norms, weigh, unobserved(spikes), places)
        outputs = self._project_back(encoded, places)
        if self.merge is None or self._merges_heads:
            return add(outputs)
        norms, weigh = unobserved((self._output_norms(places), self.merge))
        return _sum_of_normed(outputs, norms, weigh, places)

    def _encode(
        self,
        mixed: tuple[Tensor, ...],
        norms: Norms,
        weigh: Weigh | None,
        spikes: Spikes | None,
        places: Places | None = None,
    ) -> tuple[Tensor, ...]:
        """What output projections read `[B, T, N * H]`: of each branch, or of heads that met."""
        places = self._places if places is None else places
        heads, sites = normed_and_weighed(mixed, norms, weigh, places), self._sites
        if len(sites) == 1:
            heads = (add(heads),)
        return tuple(
            self.branches[i].projections.encode_heads(
                x.to(mixed[0].dtype), spikes, sites[i if len(sites) > 1 else 0]
            )
            for i, x in zip(places, heads, strict=False)
        )

    def _project_back(self, encoded: tuple[Tensor, ...], places: Places) -> tuple[Tensor, ...]:
        """Through output projections `[B, T, D]`; heads that met need only one."""
        pairs = zip(places, encoded, strict=False)
        return tuple(self.branches[i].projections.o_proj(x) for i, x in pairs)

    def _join(self, outputs: tuple[Tensor, ...]) -> Tensor:
        if self.merge is None or self._merges_heads:
            return add(outputs)
        norms, again = self._output_norms(self._places), self._norms_again
        joining = (_sum_of_normed, outputs, norms, self.merge, self._places)
        with recomputed(*joining, when=again) as out:
            return out

    def _normed(
        self, heads: tuple[Heads, ...], norms: tuple[HeadNorms, ...], places: Places
    ) -> tuple[Heads, ...]:
        """Normed heads of each branch."""
        return self._of_each_branch(tuple(map(HeadProjections.norm_heads, heads, norms)), places)

    def _of_each_branch(self, heads: tuple[Heads, ...], places: Places) -> tuple[Heads, ...]:
        """Of the projections that each branch reads."""
        return heads * (len(places) // len(heads))

    def _projections_at(self, places: Iterable[int]) -> tuple[HeadProjections, ...]:
        """Of the branches, shared ones once."""
        return tuple(dict.fromkeys(self.branches[i].projections for i in places))

    def _head_norms(self, places: Places) -> Norms:
        return tuple(self.branches[i].core.head_norm for i in places)

    def _output_norms(self, places: Places) -> Norms:
        return tuple(self.branches[i].output_norm for i in places)

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
    outputs: tuple[Tensor, ...], norms: Norms, weigh: Weigh | None, places: Places
) -> Tensor:
    return add(normed_and_weighed(outputs, norms, weigh, places)).to(outputs[0].dtype)
