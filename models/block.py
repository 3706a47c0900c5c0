"""One pre-norm residual block: a mixer (or none), then a feed-forward layer.

Sinks, where a model has them, go the same way beside the tokens. Shape letters: B batch, T tokens,
S sinks, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from models.feed_forward import SwiGLU
from models.layer_pattern import FfnKind, Mixers
from models.layers import Parts
from models.mixer import Mixer, MixerState
from models.mixture_of_experts import MixtureOfExperts
from models.norm import RMSNorm
from models.recompute import recomputed, unobserved
from models.routing import Routing
from models.sequence import SequenceContext
from models.spiking.neurons import Spikes


class Block(nn.Module):
    """Layer `layer` of a model; without mixers it is the feed-forward half alone."""

    def __init__(self, parts: Parts, mixers: Mixers, *, layer: int) -> None:
        super().__init__()
        config = parts.config
        self.layer = layer
        self._norms_again = layer in parts.recompute.norms
        self.mixer_norm: RMSNorm | None = None
        self.mixer: Mixer | None = None
        if mixers:
            self.mixer_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.mixer = Mixer(parts, mixers, layer=layer)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        has_experts = config.layers.ffns[layer] is FfnKind.mixture_of_experts
        build_ffn = MixtureOfExperts if has_experts else SwiGLU
        self.ffn: SwiGLU | MixtureOfExperts = build_ffn(parts, layer=layer)

    def forward(
        self,
        x: Tensor,
        sequence: SequenceContext,
        spikes: Spikes | None = None,
        routing: Routing | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Map the residual stream `[B, T, D]` to the next; expert layers train with a `routing`.

        With the stream of `sinks` `[1, S, D]` both.
        """
        if self.mixer is not None and self.mixer_norm is not None:
            with recomputed(self.mixer_norm, x, when=self._norms_again) as normed:
                if sinks is None:
                    x = x + self.mixer(normed, sequence, spikes)
                else:
                    sinks_normed = unobserved(self.mixer_norm)(sinks)
                    mixed = self.mixer(normed, sequence, spikes, sinks_normed)
                    x, sinks = x + mixed[0], _add(sinks, mixed[1])
                    # As large as x, which the feed-forward layer has beside it.
                    del mixed
        with recomputed(self.ffn_norm, x, when=self._norms_again) as normed:
            if isinstance(self.ffn, SwiGLU):
                out: Tensor = x + self.ffn(normed, spikes)
            else:
                out = x + self.ffn(normed, sequence.positions, spikes, routing)
        return out if sinks is None else (out, sinks + self._feed_sinks(sinks, spikes))

    def begin(self, sinks: Tensor, spikes: Spikes | None = None) -> tuple[Tensor, MixerState]:
        """Map the stream of sinks `[1, S, D]` to the next, before `extend` sees any token."""
        state: MixerState = None
        if self.mixer is not None and self.mixer_norm is not None:
            mixed, state = self.mixer.begin(self.mixer_norm(sinks), spikes)
            sinks = _add(sinks, mixed)
        return sinks + self._feed_sinks(sinks, spikes), state

    def extend(
        self,
        x: Tensor,
        state: MixerState,
        spikes: Spikes | None = None,
        *,
        first_position: int = 0,
    ) -> tuple[Tensor, MixerState]:
        """Map the next `[B, n, D]` given what the mixer remembers (None at the start).

        The given state may be changed in place and must not be used again. `first_position` is that
        of the first token in its document.
        """
        if self.mixer is not None and self.mixer_norm is not None:
            mixed, state = self.mixer.extend(self.mixer_norm(x), state, spikes)
            x = x + mixed
        normed = self.ffn_norm(x)
        if isinstance(self.ffn, SwiGLU):
            return x + self.ffn(normed, spikes), state
        positions = torch.arange(first_position, first_position + x.shape[1], device=x.device)
        return x + self.ffn(normed, positions[None], spikes), state

    def _feed_sinks(self, sinks: Tensor, spikes: Spikes | None) -> Tensor:
        normed, unrecorded = unobserved(self.ffn_norm)(sinks), unobserved(spikes)
        if isinstance(self.ffn, MixtureOfExperts):
            return self.ffn.feed_sinks(normed, unrecorded)
        out: Tensor = self.ffn(normed, unrecorded)
        return out


def _add(stream: Tensor, update: Tensor | None) -> Tensor:
    return stream if update is None else stream + update


class Blocks(nn.Module):
    """Blocks in order, each a submodule named by its layer's index in the whole model."""

    def __init__(self, blocks: Iterable[Block]) -> None:
        super().__init__()
        for block in blocks:
            self.add_module(str(block.layer), block)

    def __iter__(self) -> Iterator[Block]:
        for block in self.children():
            assert isinstance(block, Block)
            yield block

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, layer: int) -> Block:
        return self.get_submodule(str(layer))  # type: ignore[return-value]
