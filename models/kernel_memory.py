"""Bytes that attention kernels keep for their backward and need on the side.

One function a kernel of `models.kernels`: the plain ones (`chunked`, `blocked`) as autograd saves
them, the GPU ones (`fla` 0.6, `flash_attn` 2) by reading what their autograd functions save. One
document a row; packed rows need a little more. Shape letters: B rows, T tokens, N query heads, G
key-value heads, H head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

from models.kernels.blocked import band_geometry
from models.kernels.tiling import Tiling

FLA_CHUNK_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Heads:
    """One attention problem on one rank; `narrow` and `wide` are bytes of an element.

    `narrow` is the compute dtype, `wide` the same in at least float32.
    """

    rows: int
    length: int
    num_queries: int
    num_keys: int
    dim: int
    narrow: int
    wide: int

    @property
    def tokens(self) -> int:
        """B T."""
        return self.rows * self.length

    @property
    def query_elements(self) -> int:
        """B T N H."""
        return self.tokens * self.num_queries * self.dim

    @property
    def key_elements(self) -> int:
        """B T G H."""
        return self.tokens * self.num_keys * self.dim


@dataclass(frozen=True, slots=True)
class KernelMemory:
    """Which operands a kernel keeps, whether its output, how much aside, and what it needs.

    `scratch` and `backward_scratch` exist for a moment beside the output, or beside the gradients.
    """

    operands: frozenset[str]
    keeps_output: bool
    aside: int
    scratch: int
    backward_scratch: int


def softmax_memory(kernel: str, heads: Heads, window: int | None) -> KernelMemory:
    """Of `blocked` or `flash_attn`, for a window of visible keys or None."""
    if kernel == "flash_attn":
        # One float32 sum a query; the backward adds up the gradient of q in float32.
        sums = heads.tokens * heads.num_queries * 4
        return KernelMemory(_QKV, True, sums, 0, heads.query_elements * 4 + sums)
    if window is None or window >= heads.length:
        sums = heads.tokens * heads.num_queries * heads.wide
        return KernelMemory(_QKV, True, sums, 0, heads.key_elements * heads.narrow)
    return _banded(heads, window)


def linear_memory(kernel: str, heads: Heads) -> KernelMemory:
    """Of `chunked` or `fla`; operands are q, k, v and the log decay."""
    return _fla(heads) if kernel == "fla" else _chunked(heads)


_QKV = frozenset({"q", "k", "v"})


def _banded(heads: Heads, window: int) -> KernelMemory:
    """Of `models.kernels.blocked`: the first window as one causal call, then groups of bands."""
    rows = heads.rows
    share = heads.num_queries // heads.num_keys
    later = heads.length - window
    block, group = band_geometry(later, window)
    keys = stacked = masks = backward = 0
    for start in range(0, later, group):
        count = min(group, later - start)
        blocks, rest = divmod(count, block)
        is_copied = rows > 1 and blocks > 1
        if rest or not is_copied:
            keys += rows * (window - 1 + count)
        if is_copied:
            keys += rows * blocks * (window - 1 + block)
        if share > 1 or is_copied:
            stacked += rows * blocks * block
        stacked += rows * rest if share > 1 else 0
        masks += sum(share * n * (window - 1 + n) for n in (block if blocks else 0, rest))
        # The gradients of a group's bands are whole even where the bands are views, and the
        # gradient of its output is copied once, for grouped heads twice.
        bands = 2 * rows * blocks * (window - 1 + block) * heads.num_keys
        copies = (3 if share > 1 else 2) * rows * blocks * block * heads.num_queries
        backward = max(backward, bands + copies)
    # The causal call copies the keys and values of its window unless it groups heads itself.
    keys += rows * window if share == 1 else 0
    key_bytes = keys * heads.num_keys * heads.dim * heads.narrow
    query_bytes = heads.query_elements * heads.narrow
    aside = (
        2 * key_bytes
        + stacked * heads.num_queries * heads.dim * heads.narrow
        + masks * heads.narrow
        # Outputs of the pieces, and one sum a query.
        + query_bytes
        + heads.tokens * heads.num_queries * heads.wide
    )
    operands = _QKV if share > 1 else frozenset({"q"})
    # What the kernel returns is not there yet.
    made = heads.query_elements + 2 * heads.key_elements
    later_bytes = max(0, backward * heads.dim - made) * heads.narrow
    return KernelMemory(operands, False, aside, query_bytes, later_bytes)


def _chunked(heads: Heads) -> KernelMemory:
    """Of `models.kernels.chunked`: operands and a state a tile; the workspace of one tile.

    The workspace counts tensors of a tile that exist together: as large as its queries, as its
    keys, as its scores inside chunks, as its states at chunk borders.
    """
    tiling = Tiling.of_sizes(heads.rows, heads.length, heads.num_queries, heads.dim)
    state = heads.rows * heads.num_keys * heads.dim**2 * heads.wide
    tokens = tiling.rows * tiling.chunks * tiling.chunk
    queries = tokens * heads.num_queries * heads.dim
    keys = tokens * heads.num_keys * heads.dim
    scores = tokens * heads.num_queries * tiling.chunk
    states = tiling.rows * (tiling.chunks + 1) * heads.num_keys * heads.dim**2
    levels = tiling.chunk.bit_length() - 1
    forward = 3 * queries + (5.5 + levels) * keys + 1.25 * scores + states
    backward = 4 * queries + (10.5 + levels) * keys + 2.25 * scores + 3 * states
    return KernelMemory(
        operands=_QKV | {"log_decay"},
        keeps_output=False,
        aside=state * len(tiling.spans()),
        scratch=int(forward) * heads.wide,
        backward_scratch=int(backward) * heads.wide + 2 * state,
    )


def _fla(heads: Heads) -> KernelMemory:
    """Of `chunk_gla` 0.6: keys, values and float32 gates once a query head, scores in chunks.

    Its backward computes the states of all chunks again, in float32 as all gradients are.
    """
    elements, chunk = heads.query_elements, FLA_CHUNK_TOKENS
    scores = heads.tokens * heads.num_queries * chunk * 4
    states = heads.rows * -(-heads.length // chunk) * heads.num_queries * heads.dim**2
    kept = 2 * elements * heads.narrow + elements * 4 + scores
    backward = 2 * states * 4 + scores + 5 * elements * 4 + elements * heads.narrow
    return KernelMemory(frozenset({"q"}), False, kept, states * heads.narrow, backward)
