"""Rotary position embedding: frequencies of every supported type, tables, and the rotation.

Angles come from integer positions in float64, because float32 angles are off by 5e-3 rad at 128k
tokens; cosines and sines are then rounded to at least float32. Channel i pairs with channel
i + H/2 (the "rotate half" layout of Qwen and Llama checkpoints).

Shape letters: B batch, T tokens, N heads, H head dim.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.config import ModelConfig
from models.mixer_config import RopeConfig, RopeType
from models.sequence import SequenceContext


@dataclass(frozen=True, slots=True)
class Rotation:
    """Cosines and sines `[B or 1, T, 1, H / 2]` in at least float32."""

    cos: Tensor
    sin: Tensor


class Rotary:
    """Angles of one model. Remembers the last tables only, so that layers share them."""

    def __init__(self, config: ModelConfig) -> None:
        # A model that is built on the meta device still needs values here: these are no parameters.
        with torch.device("cpu"):
            self._frequencies, self._scale = inverse_frequencies(config)
        self._key: Hashable = None
        self._positions: weakref.ref[Tensor] | None = None
        self._rotation: Rotation | None = None
        self._of_sinks: tuple[Hashable, Rotation] | None = None

    def for_sequence(self, sequence: SequenceContext, dtype: torch.dtype) -> Rotation:
        """Tables of a packed batch, in at least float32 and no less than `dtype`."""
        positions = sequence.positions
        if sequence.is_one_document_per_row:
            return self.for_range(0, sequence.num_tokens, positions.device, dtype)
        remembered = None if self._positions is None else self._positions()
        if remembered is not positions or self._key != dtype or self._rotation is None:
            self._rotation = self.compute(positions, dtype)
            self._key = dtype
            self._positions = weakref.ref(positions)
        return self._rotation

    def for_range(
        self, start: int, length: int, device: torch.device, dtype: torch.dtype
    ) -> Rotation:
        """Tables `[1, length, 1, H / 2]` of consecutive positions from `start`."""
        key = (start, length, device, dtype)
        if self._key != key or self._rotation is None:
            positions = torch.arange(start, start + length, device=device)
            self._rotation = self.compute(positions[None], dtype)
            self._key = key
            self._positions = None
        return self._rotation

    def for_sinks(
        self, start: int, length: int, device: torch.device, dtype: torch.dtype
    ) -> Rotation:
        """As `for_range`, for sinks, which may stand in front of 0; remembered besides."""
        key = (start, length, device, dtype)
        if self._of_sinks is None or self._of_sinks[0] != key:
            positions = torch.arange(start, start + length, device=device)
            self._of_sinks = key, self.compute(positions[None], dtype)
        return self._of_sinks[1]

    def compute(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """Tables of integer `positions` `[B, T]`, not remembered."""
        table_dtype = torch.promote_types(dtype, torch.float32)
        # A remembered table must stay usable by autograd after an evaluation in inference mode.
        with torch.inference_mode(mode=False), torch.no_grad():
            frequencies = self._frequencies.to(positions.device)
            angles = (positions.to(torch.float64)[..., None] * frequencies).unsqueeze(2)
            return Rotation(
                cos=(angles.cos() * self._scale).to(table_dtype),
                sin=(angles.sin() * self._scale).to(table_dtype),
            )


class _Rotate(torch.autograd.Function):
    """Two-dimensional rotation of channel pairs; the backward turns the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], cos, sin, -1.0), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    out = torch.empty(x.shape, dtype=cos.dtype, device=x.device)
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin, value=sign)
    return out.to(x.dtype)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate `[B, T, N, H]`; computes in the tables' dtype, returns x's."""
    out: Tensor = _Rotate.apply(x, rotation.cos, rotation.sin)  # type: ignore[no-untyped-call]
    return out


def inverse_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Radians per position of each channel pair, and the factor of cosines and sines.

    Returns:
        `[H / 2]` float64, and 1.0 except for YaRN (whose paper scales attention by it twice).
    """
    rope = config.rope
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    plain = rope.theta**-exponents
    trained = rope.original_max_position_embeddings or config.max_position_embeddings
    if rope.type is RopeType.linear:
        return plain / rope.factor, 1.0
    if rope.type is RopeType.llama3:
        return _llama3(plain, rope, trained), 1.0
    if rope.type is RopeType.yarn:
        return _yarn(plain, rope, trained), _yarn_scale(rope)
    return plain, 1.0


def _llama3(plain: Tensor, rope: RopeConfig, trained: int) -> Tensor:
    """Slow pairs stretched by the factor, fast ones kept, a linear blend in turns between them."""
    turns = trained * plain / (2 * math.pi)
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return plain * (keep + (1 - keep) / rope.factor)


def _yarn(plain: Tensor, rope: RopeConfig, trained: int) -> Tensor:
    """Blend by channel index between the pairs making `beta_fast` and `beta_slow` turns."""
    pairs = plain.shape[0]

    def index_of(turns: float) -> float:
        return pairs * math.log(trained / (turns * 2 * math.pi)) / math.log(rope.theta)

    low, high = index_of(rope.beta_fast), index_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    if low == high:
        high += 0.001
    index = torch.arange(pairs, dtype=torch.float64)
    stretch = ((index - low) / (high - low)).clamp(0.0, 1.0)
    return plain * (stretch / rope.factor + (1 - stretch))


def _yarn_scale(rope: RopeConfig) -> float:
    """The YaRN attention factor (paper, equation 22), or DeepSeek's ratio of two."""
    if rope.attention_factor is not None:
        return rope.attention_factor

    def scale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)
