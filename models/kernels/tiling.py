"""How a `[B, T]` batch is cut into tiles that stay in cache, and moved into and out of them.

Owns the tile sizes, the scratch memory and the document masks; knows no attention algebra (that is
`models.kernels.tile`). Shape letters: B batch rows, T tokens, N query heads, G key-value heads,
R = N / G, M chunks of a tile, C tokens a chunk, H head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

# Measured on 2 cores, H = 64 and 128: 32 is as fast as 64 and 128 forward and faster backward (the
# wasted upper triangle of the scores grows with the chunk), a tile of 2 MB keeps the ten or so
# temporaries of one tile within the last-level cache.
_CHUNK_TOKENS = 32
_TILE_ELEMENTS = 1 << 19


Where = tuple[slice, slice, int]
"""Rows, tokens and chunk length of a tile."""


class Workspace:
    """Scratch memory by name, reused from tile to tile: fresh pages cost more than the products."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._buffers: dict[str, Tensor] = {}

    def empty(self, name: str, *shape: int) -> Tensor:
        """Uninitialised memory; it holds until the same name is asked for again."""
        size = prod(shape)
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = self._like.new_empty(size)
        return self._buffers[name][:size].view(shape)

    def scores(self, *shape: int) -> Tensor:
        """A score matrix whose upper triangle is zero: whoever fills it writes the lower one."""
        size = prod(shape)
        name = f"scores {shape[-1]}"
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = self._like.new_zeros(size)
        return self._buffers[name][:size].view(shape)


@dataclass(frozen=True, slots=True)
class Tiling:
    """A batch cut into tiles of whole chunks, each small enough for the cache."""

    num_rows: int
    num_tokens: int
    chunk: int
    rows: int
    chunks: int

    @classmethod
    def of(cls, q: Tensor) -> Tiling:
        """The tiling of a batch with queries `[B, T, N, H]`."""
        return cls.of_sizes(*q.shape)

    @classmethod
    def of_sizes(cls, num_rows: int, num_tokens: int, heads: int, dim: int) -> Tiling:
        """The tiling of queries of these sizes."""
        chunk = min(_CHUNK_TOKENS, 1 << (num_tokens - 1).bit_length())
        fit = max(1, _TILE_ELEMENTS // (heads * dim * chunk))
        rows = min(num_rows, fit)
        chunks = min(-(-num_tokens // chunk), max(1, fit // rows))
        return cls(num_rows, num_tokens, chunk, rows, chunks)

    def row_blocks(self) -> Iterator[slice]:
        """Row ranges, in order."""
        for start in range(0, self.num_rows, self.rows):
            yield slice(start, min(start + self.rows, self.num_rows))

    def spans(self) -> list[slice]:
        """Token ranges, in order; only the last may end inside a chunk."""
        step = self.chunks * self.chunk
        return [
            slice(start, min(start + step, self.num_tokens))
            for start in range(0, self.num_tokens, step)
        ]


@dataclass(frozen=True, slots=True)
class Masks:
    """Who shares a document: two tokens of a chunk (`same` `[B, 1, M, C, 1, C]`), a token and the
    state entering or leaving its chunk (`enters`, `leaves` `[B, 1, M, C, 1]`)."""

    same: Tensor
    enters: Tensor
    leaves: Tensor


@dataclass(frozen=True, slots=True)
class Inputs:
    """One tile, in the computing dtype; q holds the scale, the tail beyond T is zero.

    `document_state` `[G, H, H]` is what documents that begin in the tile start from (with masks
    only); None is zero.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    masks: Masks | None
    document_state: Tensor | None = None


def load(
    work: Workspace,
    batch: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None],
    where: Where,
    scale: float,
    document_state: Tensor | None = None,
) -> Inputs:
    """Cut a tile out of `q, k, v, log_decay` `[B, T, heads, H]` and `document_ids` `[B, T]`."""
    q, k, v, log_decay, document_ids = batch
    groups = k.shape[2]
    queries = load_heads(work, "q", q, where, groups)
    keys, values, gates = (
        load_heads(work, name, x, where, groups).squeeze(4)
        for name, x in (("k", k), ("v", v), ("log_decay", log_decay))
    )
    masks = None if document_ids is None else _masks(document_ids, where)
    return Inputs(queries.mul_(scale), keys, values, gates, masks, document_state)


def load_heads(work: Workspace, name: str, x: Tensor, where: Where, groups: int) -> Tensor:
    """`[B, G, M, C, heads / G, H]` of `x` `[B, T, heads, H]`, zero beyond its last token."""
    rows, span, chunk = where
    source = split_dim(x[rows, span], 2, (groups, -1)).permute(0, 2, 1, 3, 4)
    length = source.shape[2]
    chunks = -(-length // chunk)
    target = work.empty(name, *source.shape[:2], chunks * chunk, *source.shape[3:])
    target[:, :, :length].copy_(source)
    target[:, :, length:].zero_()
    return split_dim(target, 2, (chunks, chunk))


def store(source: Tensor, target: Tensor) -> None:
    """Write a tile `[B, G, M, C, (R,) H]` to its place `[B, tokens, heads, H]`, less the tail."""
    flat = source.flatten(2, 3)
    flat = flat if flat.dim() == 5 else flat.unsqueeze(3)
    length = target.shape[1]
    split_dim(target, 2, flat.shape[1:4:2]).copy_(flat[:, :, :length].transpose(1, 2))


def _masks(document_ids: Tensor, where: Where) -> Masks:
    rows, span, chunk = where
    ids = document_ids[rows, span]
    missing = -ids.shape[1] % chunk
    ids = torch.cat([ids, ids[:, -1:].expand(-1, missing)], dim=1).view(len(ids), -1, chunk)
    # The state entering a tile belongs to the document of the token before it.
    before = document_ids[rows, max(span.start - 1, 0), None]
    entering = torch.cat([before, ids[:, :-1, -1]], dim=1)
    return Masks(
        same=(ids[:, None, :, :, None, None] == ids[:, None, :, None, None, :]),
        enters=(ids == entering[:, :, None])[:, None, :, :, None],
        leaves=(ids == ids[:, :, -1:])[:, None, :, :, None],
    )


def split_dim(x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    """View of x with one dim (not negative) split into several; one size may be -1."""
    return x.view(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])
