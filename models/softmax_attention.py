"""The full (`F`) and sliding-window (`S`) softmax mixers, with their decoding caches.

Shape letters: B batch, T tokens, D hidden, N query heads, G key-value heads, H head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.layer_pattern import MixerKind
from models.layers import Parts
from models.projections import HeadNorms, HeadProjections, Heads
from models.recompute import recomputed
from models.rotary import Rotation, rotate
from models.sequence import SequenceContext
from models.spiking.neurons import Spikes


class KeyValueCache:
    """Rotated keys and values that later queries can still see.

    Without `window_tokens` it grows by doubling; with it, it is a ring of that many slots, whose
    order does not matter to a single query because rotation has put positions into the keys.
    Appending changes the cache in place.
    """

    def __init__(self, window_tokens: int | None) -> None:
        self.window_tokens = window_tokens
        self.num_seen = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add `[B, n, G, H]` of the next n tokens.

        Returns:
            Keys and values that those n queries may see, n new ones last; for n = 1 all of them are
            visible, in any order.
        """
        window, count = self.window_tokens, keys.shape[1]
        if window is None or count == 1:
            self._write(keys, values)
            assert self.keys is not None
            assert self.values is not None
            filled = self.num_seen if window is None else min(self.num_seen, window)
            return self.keys[:, :filled], self.values[:, :filled]
        old_keys, old_values = self._latest(window - 1)
        if old_keys is not None and old_values is not None:
            all_keys = torch.cat([old_keys, keys], dim=1)
            all_values = torch.cat([old_values, values], dim=1)
        else:
            all_keys, all_values = keys, values
        self.num_seen += max(0, count - window)
        self._write(keys[:, -window:], values[:, -window:])
        return all_keys, all_values

    def copy(self) -> KeyValueCache:
        """An independent cache with the same content."""
        twin = KeyValueCache(self.window_tokens)
        twin.num_seen = self.num_seen
        twin.keys = None if self.keys is None else self.keys.clone()
        twin.values = None if self.values is None else self.values.clone()
        return twin

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return sum(t.numel() * t.element_size() for t in (self.keys, self.values) if t is not None)

    def _slots(self, start: int, count: int, device: torch.device) -> Tensor:
        slots = torch.arange(start, start + count, device=device)
        return slots if self.window_tokens is None else slots % self.window_tokens

    def _write(self, keys: Tensor, values: Tensor) -> None:
        """Put the next tokens (at most a window of them) into their slots."""
        count = keys.shape[1]
        buffers = self._reserve(keys, self.num_seen + count)
        slots = self._slots(self.num_seen, count, keys.device)
        for buffer, new in zip(buffers, (keys, values), strict=True):
            buffer.index_copy_(1, slots, new)
        self.num_seen += count

    def _reserve(self, like: Tensor, needed: int) -> tuple[Tensor, Tensor]:
        """Buffers of at least `needed` slots (at most a window), doubled when too small."""
        held = 0 if self.keys is None else self.keys.shape[1]
        if self.window_tokens is not None:
            needed = min(needed, self.window_tokens)
        if self.keys is not None and self.values is not None and held >= needed:
            return self.keys, self.values
        size = max(needed, 2 * held)
        if self.window_tokens is not None:
            size = min(size, self.window_tokens)
        shape = (like.shape[0], size, *like.shape[2:])
        grown_keys, grown_values = like.new_zeros(shape), like.new_zeros(shape)
        if self.keys is not None and self.values is not None:
            grown_keys[:, :held], grown_values[:, :held] = self.keys, self.values
        self.keys, self.values = grown_keys, grown_values
        return grown_keys, grown_values

    def _latest(self, limit: int) -> tuple[Tensor | None, Tensor | None]:
        """The last `limit` tokens in order; None when there are none."""
        count = min(self.num_seen, limit)
        if self.keys is None or self.values is None or count == 0:
            return None, None
        slots = self._slots(self.num_seen - count, count, self.keys.device)
        return self.keys.index_select(1, slots), self.values.index_select(1, slots)


class SoftmaxAttention(HeadProjections):
    """Causal softmax attention with rotary positions, grouped queries and an optional window."""

    def __init__(self, parts: Parts, *, kind: MixerKind, layer: int) -> None:
        super().__init__(parts, layer=layer)
        is_windowed = kind is MixerKind.sliding_window
        self.window_tokens = parts.config.visible_window_tokens if is_windowed else None
        self._kernel = parts.kernels.softmax_attention
        self._rotary = parts.rotary

    def forward(self, x: Tensor, sequence: SequenceContext, spikes: Spikes | None = None) -> Tensor:
        """Mix `[B, T, D]` within documents."""
        again, operands = self._mixer_again, self._operands(x, sequence, spikes)
        with (
            recomputed(self._attend, *operands, sequence, when=again) as mixed,
            recomputed(self.encode_heads, mixed, spikes, when=again) as encoded,
        ):
            out: Tensor = self.o_proj(encoded)
        return out

    def attend(self, x: Tensor, sequence: SequenceContext, spikes: Spikes | None = None) -> Tensor:
        """Head outputs `[B, T, N, H]` before the output projection."""
        return self._attend(*self._operands(x, sequence, spikes), sequence)

    def _operands(
        self, x: Tensor, sequence: SequenceContext, spikes: Spikes | None
    ) -> tuple[Heads, HeadNorms, Rotation]:
        with recomputed(self.enter, x, spikes, when=self._norms_again) as entered:
            heads = self.heads(entered)
        return heads, self.head_norms, self._rotary.for_sequence(sequence, x.dtype)

    def _attend(
        self, heads: Heads, norms: HeadNorms, rotation: Rotation, sequence: SequenceContext
    ) -> Tensor:
        q, k, v = self.norm_heads(heads, norms)
        return self._kernel(
            rotate(q, rotation),
            rotate(k, rotation),
            v,
            scale=self.scale,
            window=self.window_tokens,
            sequence=sequence,
        )

    def extend(
        self, x: Tensor, state: KeyValueCache | None, spikes: Spikes | None = None
    ) -> tuple[Tensor, KeyValueCache]:
        """Mix the next `[B, n, D]` after what `state` holds; changes `state` in place."""
        cache = KeyValueCache(self.window_tokens) if state is None else state
        q, k, v = self.project(self.enter(x, spikes))
        rotation = self._rotary.for_range(cache.num_seen, x.shape[1], x.device, x.dtype)
        keys, values = cache.append(rotate(k, rotation), v)
        # A single query sees everything its cache returns; the slots of a ring are not in order.
        window = None if x.shape[1] == 1 else self.window_tokens
        heads = self._kernel(
            rotate(q, rotation), keys, values, scale=self.scale, window=window, sequence=None
        )
        return self.combine(heads, spikes), cache
