"""The mathematics of a Synfire model's mixers in plain torch: places, rotary positions, attention.

Rows hold real tokens on the right, behind padding that nothing sees and that leaves no trace.
Shape letters: B rows, T tokens, D hidden, N query heads, G key-value heads, H head dim, S sink
tokens, M keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

QUERY_BLOCK = 1024
"""Queries whose mask exists at a time."""
CHUNK = 32
"""Tokens that the linear mixer sees at a time."""

State = dict[str, Tensor]
"""What a layer remembers of earlier tokens, `[B, ...]` by name."""


def widened(x: Tensor) -> Tensor:
    """In at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass
class Place:
    """Where T new tokens stand in their rows.

    `num_before` `[B]` real tokens came before; the first `pads` `[B]` of the T are padding.
    """

    num_before: Tensor
    num_tokens: int
    pads: Tensor | None = None

    @property
    def positions(self) -> Tensor:
        """Of each token among the real ones of its row, `[B, T]`; meaningless for padding."""
        index = torch.arange(self.num_tokens, device=self.num_before.device)
        shift = self.num_before if self.pads is None else self.num_before - self.pads
        return shift[:, None] + index

    @property
    def num_after(self) -> Tensor:
        """Real tokens of each row with these, `[B]`."""
        after = self.num_before + self.num_tokens
        return after if self.pads is None else after - self.pads

    @property
    def is_real(self) -> Tensor | None:
        """`[B, T]`; None where all are."""
        if self.pads is None:
            return None
        return torch.arange(self.num_tokens, device=self.pads.device) >= self.pads[:, None]


@dataclass
class Stream:
    """What a mixer is told about the tokens that it mixes.

    Args:
        place: where they stand; None for sink tokens, which stand in no row.
        rotation: cosines and sines `[B, T, 1, H / 2]`; None turns nothing.
        state: what this layer remembers of earlier tokens; None for nothing, also afterwards.
        sinks: what sink tokens leave for tokens in this layer, filled by their own stream.
    """

    place: Place | None
    rotation: tuple[Tensor, Tensor] | None
    state: State | None = None
    sinks: State = field(default_factory=dict)


def rope_frequencies(config: Any) -> tuple[Tensor, float]:
    """Radians a position of each channel pair `[H / 2]` float64, and the factor of cos and sin."""
    rope = config.rope
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device="cpu")
    plain: Tensor = rope["theta"] ** -(exponents / config.head_dim)
    trained = rope["original_max_position_embeddings"] or config.max_position_embeddings
    if rope["type"] == "linear":
        return plain / rope["factor"], 1.0
    if rope["type"] == "llama3":
        turns = trained * plain / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        return plain * (keep + (1 - keep) / rope["factor"]), 1.0
    if rope["type"] == "yarn":
        return _yarn(plain, rope, trained), float(_yarn_scale(rope))
    return plain, 1.0


def _yarn(plain: Tensor, rope: dict[str, Any], trained: int) -> Tensor:
    pairs = len(plain)
    low, high = (
        pairs * math.log(trained / (rope[name] * 2 * math.pi)) / math.log(rope["theta"])
        for name in ("beta_fast", "beta_slow")
    )
    if rope["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    if low == high:
        high += 0.001
    index = torch.arange(pairs, dtype=plain.dtype, device=plain.device)
    stretch = ((index - low) / (high - low)).clamp(0.0, 1.0)
    factor: float = rope["factor"]
    return plain * (stretch / factor + (1 - stretch))


def _yarn_scale(rope: dict[str, Any]) -> Any:
    if rope["attention_factor"] is not None:
        return rope["attention_factor"]
    logarithm = 0.1 * math.log(rope["factor"])
    if rope["mscale"] and rope["mscale_all_dim"]:
        return (logarithm * rope["mscale"] + 1.0) / (logarithm * rope["mscale_all_dim"] + 1.0)
    return logarithm + 1.0


def rotation_of(
    positions: Tensor, frequencies: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions `[B, T]`; angles are float64, because float32 ones drift."""
    angles = (positions.double()[..., None] * frequencies.to(positions.device)).unsqueeze(2)
    wide = torch.promote_types(dtype, torch.float32)
    return (angles.cos() * scale).to(wide), (angles.sin() * scale).to(wide)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
    """Turn channel i with channel i + H / 2 of `[B, T, N, H]`."""
    if rotation is None:
        return x
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def softmax_attention(  # noqa: PLR0913 - what attention is made of
    q: Tensor,
    k: Tensor,
    v: Tensor,
    place: Place,
    *,
    scale: float,
    window: int | None,
    sinks: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Causal attention of `[B, T, N, .]` over M >= T keys `[B, M, G, .]`, and over all sinks.

    The last T keys are the queries' own. Sink keys and values are `[1, S, G, .]`.
    """
    num_keys, num_new = k.shape[1], q.shape[1]
    positions = place.positions
    key_positions = positions[:, -1:] + torch.arange(1 - num_keys, 1, device=q.device)
    blocks = []
    for start in range(0, num_new, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, num_new)
        end = num_keys - num_new + stop
        begin = 0 if window is None else max(0, num_keys - num_new + start - window + 1)
        there = key_positions[:, None, begin:end]
        distance = positions[:, start:stop, None] - there
        visible = (distance >= 0) & (there >= 0)
        if window is not None:
            visible &= distance < window
        visible |= distance == 0  # padding sees itself, so that it stays finite
        keys, values = k[:, begin:end], v[:, begin:end]
        if sinks is not None:
            keys, values = (
                torch.cat([sink.expand(len(q), -1, -1, -1), own], dim=1)
                for sink, own in zip(sinks, (keys, values), strict=True)
            )
            visible = F.pad(visible, (sinks[0].shape[1], 0), value=True)
        block = q[:, start:stop]
        blocks.append(attend_all(block, keys, values, scale=scale, visible=visible[:, None]))
    return torch.cat(blocks, dim=1)


def attend_all(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, visible: Tensor | None = None
) -> Tensor:
    """Attention of `[B, T, N, .]` over all of `[B, M, G, .]`, or the `visible` `[B, 1, T, M]`."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, visible, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """`S_t = exp(log_decay_t) S_{t-1} + k_t^T v_t`, `o_t = scale q_t S_t`, chunk by chunk.

    q `[B, T, N, H]`; k, v and log_decay `[B, T, G, H]`; the state `[B, G, H, H]` (key, value).
    Exponents are differences of cumulative decays inside a chunk, never above 0.
    """
    queries = (widened(q) * scale).view(*k.shape[:3], -1, k.shape[3])
    keys, values = widened(k), widened(v)
    outputs = []
    for start in range(0, q.shape[1], CHUNK):
        part = slice(start, start + CHUNK)
        qs, ks, vs, sums = queries[:, part], keys[:, part], values[:, part], log_decay[:, part]
        sums = sums.cumsum(dim=1)
        earlier = torch.einsum("bignk,bgkv->bignv", qs * sums.exp().unsqueeze(3), state)
        size = ks.shape[1]
        is_later = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
        gaps = sums[:, :, None] - sums[:, None]
        gaps = gaps.masked_fill(is_later[:, :, None, None], -torch.inf)
        scores = torch.einsum("bignk,bijgk->bijgn", qs, gaps.exp() * ks[:, None])
        outputs.append(earlier + torch.einsum("bijgn,bjgv->bignv", scores, vs))
        total = sums[:, -1:]
        added = torch.einsum("bjgk,bjgv->bgkv", ks * (total - sums).exp(), vs)
        state = total[:, 0, :, :, None].exp() * state + added
    return torch.cat(outputs, dim=1).flatten(2, 3).to(q.dtype), state


def append(old: Tensor | None, new: Tensor, pads: Tensor | None) -> Tensor:
    """`[B, M, ...]` and `[B, T, ...]` as one, real tokens on the right."""
    if old is None:
        return new
    joined = torch.cat([old, new], dim=1)
    if pads is None:
        return joined
    column = torch.arange(joined.shape[1], device=pads.device)[None]
    shifted = (column - pads[:, None]).clamp(min=0)
    source = torch.where(column >= old.shape[1] + pads[:, None], column, shifted)
    return joined.gather(1, source[:, :, None, None].expand_as(joined))
