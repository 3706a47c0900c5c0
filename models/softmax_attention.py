"""The core of the full (`F`) and sliding-window (`S`) softmax mixers, with its decoding caches.

Shape letters: B batch, T tokens, S sinks, D hidden, N query heads, G key-value heads, H head dim.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from models.kernels import SinkKeys, sink_attention
from models.layer_pattern import MixerKind
from models.layers import Parts
from models.mixer_core import MixerCore, Operands, SinkMemory
from models.norm import RMSNorm
from models.projections import Heads
from models.rotary import Rotation, rotate
from models.sequence import SequenceContext
from models.sinks import first_position


class KeyValueCache:
    """Rotated keys and values that later queries can still see.

    Without `window_tokens` it grows by doubling; with it, it is a ring of that many slots, whose
    order does not matter to a single query because rotation has put positions into the keys.
    Appending changes the cache in place. Keys of `sinks` are always visible besides, and stay.
    """

    def __init__(self, window_tokens: int | None, sinks: SinkKeys | None = None) -> None:
        self.window_tokens = window_tokens
        self.sinks = sinks
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
        twin = KeyValueCache(self.window_tokens, self.sinks)
        twin.num_seen = self.num_seen
        twin.keys = None if self.keys is None else self.keys.clone()
        twin.values = None if self.values is None else self.values.clone()
        return twin

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        held = [self.keys, self.values]
        if self.sinks is not None:
            held += [self.sinks.k, self.sinks.v]
        return sum(t.numel() * t.element_size() for t in held if t is not None)

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


class SoftmaxAttention(MixerCore):
    """Causal softmax attention with rotary positions, grouped queries and an optional window."""

    has_sinks = True

    def __init__(self, parts: Parts, *, kind: MixerKind, has_head_norm: bool) -> None:
        super().__init__()
        config, is_windowed = parts.config, kind is MixerKind.sliding_window
        self.window_tokens = config.visible_window_tokens if is_windowed else None
        self.scale = config.head_dim**-0.5
        self.head_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if has_head_norm else None
        self._kernel = parts.kernels.softmax_attention
        self._rotary = parts.rotary
        self._first_sink = first_position(config.sinks)

    def operands(self, entered: Tensor, sequence: SequenceContext) -> Operands:
        """The rotation of every position."""
        return (self._rotary.for_sequence(sequence, entered.dtype),)

    def sink_operands(self, entered: Tensor) -> Operands:
        """The rotation of every sink, or None."""
        if self._first_sink is None:
            return (None,)
        place = (self._first_sink, entered.shape[1], entered.device)
        return (self._rotary.for_sinks(*place, entered.dtype),)

    def attend(
        self,
        heads: Heads,
        operands: Operands,
        sequence: SequenceContext,
        sinks: SinkMemory = None,
    ) -> Tensor:
        """Head outputs `[B, T, N, H]`."""
        (q, k, v), (rotation,) = heads, operands
        return self._kernel(
            rotate(q, rotation),
            rotate(k, rotation),
            v,
            scale=self.scale,
            window=self.window_tokens,
            sequence=sequence,
            sinks=self._keys(sinks, q),
        )

    def attend_sinks(self, heads: Heads, operands: Operands) -> tuple[Tensor, SinkMemory]:
        """Head outputs `[1, S, N, H]` without a mask, and the keys for tokens."""
        (q, k, v), (rotation,) = heads, operands
        if isinstance(rotation, Rotation):
            q, k = rotate(q, rotation), rotate(k, rotation)
        keys = SinkKeys(k[0], v[0])
        return sink_attention(q, keys, scale=self.scale), keys

    def begin(self, sinks: SinkMemory) -> KeyValueCache:
        """A cache that holds sinks alone."""
        assert isinstance(sinks, SinkKeys)
        return KeyValueCache(self.window_tokens, sinks)

    def _keys(self, sinks: SinkMemory, q: Tensor) -> SinkKeys | None:
        """As queries `[B, T, N, H]`, not rotated yet, see them."""
        if not isinstance(sinks, SinkKeys):
            return None
        return replace(sinks, q=q) if self._first_sink is None else sinks

    def extend(
        self, heads: Heads, entered: Tensor, state: KeyValueCache | None
    ) -> tuple[Tensor, KeyValueCache]:
        """As `attend`, after what `state` holds; changes `state` in place."""
        cache = KeyValueCache(self.window_tokens) if state is None else state
        q, k, v = heads
        num_tokens = q.shape[1]
        rotation = self._rotary.for_range(cache.num_seen, num_tokens, q.device, q.dtype)
        keys, values = cache.append(rotate(k, rotation), v)
        # A single query sees everything its cache returns; the slots of a ring are not in order.
        window = None if num_tokens == 1 else self.window_tokens
        mixed = self._kernel(
            rotate(q, rotation),
            keys,
            values,
            scale=self.scale,
            window=window,
            sequence=None,
            sinks=self._keys(cache.sinks, q),
        )
        return mixed, cache
