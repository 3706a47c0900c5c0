"""The decays of one tile of chunked gated linear attention, and the views that they multiply.

Sums of log decays are built by doubling and never subtracted; how they are used is in
`models.kernels.tile`, with the same shape letters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.kernels.tiling import Inputs, split_dim


@dataclass(frozen=True, slots=True)
class Factors:
    """Exponentials of one tile: per level (query, key), of the chunk's prefix and suffix sums.

    `start` is what is left, at each token, of the state that its document started from in the same
    chunk: zero for documents that entered the chunk. None without such a state.
    """

    levels: list[tuple[Tensor, Tensor]]
    prefix: Tensor
    suffix: Tensor
    start: Tensor | None

    @property
    def total(self) -> Tensor:
        """What is left of the entering state at the chunk's end, `[B, G, M, H, 1]`."""
        return self.prefix[:, :, :, -1].unsqueeze(-1)


def factors_of(inputs: Inputs) -> Factors:
    """The factors of a tile, with its documents masked."""
    prefix = inputs.log_decay.clone()
    suffix = torch.zeros_like(prefix)
    levels = []
    for size in sizes(prefix.shape[3]):
        key_prefix, query_prefix = halves(prefix, size)
        key_suffix, _ = halves(suffix, size)
        levels.append((query_prefix.exp(), key_suffix.exp()))
        key_suffix += query_prefix[..., -1:, :]
        query_prefix += key_prefix[..., -1:, :]
    prefix, suffix = prefix.exp_(), suffix.exp_()
    if inputs.masks is not None:
        prefix *= inputs.masks.enters
        suffix *= inputs.masks.leaves
    return Factors(levels, prefix, suffix, _start_factor(inputs))


def _start_factor(inputs: Inputs) -> Tensor | None:
    """As `prefix`, but sums begin with the token's document; zero where it began before."""
    if inputs.document_state is None or inputs.masks is None:
        return None
    sums = inputs.log_decay.clone()
    for size in sizes(sums.shape[3]):
        earlier, later = halves(sums, size)
        same = score_blocks(inputs.masks.same, size)[..., -1]
        later += torch.where(same, earlier[..., -1:, :], 0.0)
    return sums.exp_().mul_(~inputs.masks.enters)


def sizes(chunk: int) -> list[int]:
    """Tokens of a sub-block at each level."""
    return [1 << level for level in range(chunk.bit_length() - 1)]


def halves(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Views of the key and the query sub-blocks of a level: `[B, G, M, C / 2s, s, ...]` each."""
    pairs = split_dim(x, 3, (-1, 2, size))
    return pairs[:, :, :, :, 0], pairs[:, :, :, :, 1]


def score_blocks(scores: Tensor, size: int) -> Tensor:
    """View of a level's blocks `[B, G, M, C / 2s, s, R, s]` of scores `[B, G, M, C, R, C]`."""
    pairs = split_dim(split_dim(scores, 5, (-1, 2, size)), 3, (-1, 2, size))
    return pairs[:, :, :, :, 1, :, :, :, 0].diagonal(0, 3, 6).movedim(-1, 3)
