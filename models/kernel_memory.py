"""Bytes that attention kernels keep for their backward and need on the side.

One function a kernel of `models.kernels`: the plain ones (`chunked`, `blocked`) as autograd saves
them, the GPU ones (`fla` 0.6, `flash_attn` 2) by reading what their autograd functions save. One
document a row; packed rows need a little more. Shape letters: B rows, T tokens, N query heads, G
key-value heads, H head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

from models.kernels.blocked import band_geometry
from models.kernels.flash_sinks import QUERIES_A_COPY
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


@dataclass(frozen=True, slots=True)
class SinkSizes:
    """How many keys every query sees besides; `scores_apart`: other queries score them."""

    count: int
    scores_apart: bool


NO_SINKS = SinkSizes(0, scores_apart=False)


def softmax_memory(
    kernel: str, heads: Heads, window: int | None, sinks: SinkSizes | None = None
) -> KernelMemory:
    """Of `blocked` or `flash_attn`, for a window of visible keys or None, with sinks or None."""
    sinks = sinks or NO_SINKS
    if kernel == "flash_attn":
        # One float32 sum a query; the backward adds up the gradient of q in float32.
        sums = heads.tokens * heads.num_queries * 4
        # Keys, values and their gradients, once a piece of queries.
        copies = -(-heads.tokens // QUERIES_A_COPY) * sinks.count if sinks.count else 0
        beside = 4 * copies * heads.num_keys * heads.dim * heads.narrow
        if sinks.count and not sinks.scores_apart:
            beside += heads.query_elements * heads.narrow
        backward = heads.query_elements * 4 + sums + beside
        return KernelMemory(_QKV, True, sums, _merging(heads, heads.tokens, sinks), backward)
    if window is None or window >= heads.length:
        sums = heads.tokens * heads.num_queries * heads.wide
        beside = _sink_gradients(heads, heads.tokens, heads.rows, sinks)
        backward = heads.key_elements * heads.narrow + beside
        return KernelMemory(_QKV, True, sums, _merging(heads, heads.tokens, sinks), backward)
    return _banded(heads, window, sinks)


def _merging(heads: Heads, tokens: int, sinks: SinkSizes) -> int:
    """Beside merged outputs of so many queries: both parts, in the wide dtype too, and that."""
    queries = tokens * heads.num_queries * heads.dim
    if not sinks.count:
        return 0
    if heads.narrow == heads.wide:
        return 2 * queries * heads.narrow
    return queries * (heads.narrow + 3 * heads.wide)


def _sink_gradients(heads: Heads, tokens: int, rows: int, sinks: SinkSizes) -> int:
    """Beside the gradients of a piece: those of its queries for sinks, and of sinks row by row."""
    if not sinks.count:
        return 0
    queries = tokens * heads.num_queries * (2 if sinks.scores_apart else 1)
    keys = 2 * rows * sinks.count * heads.num_keys
    return (queries + keys) * heads.dim * heads.narrow


def linear_memory(kernel: str, heads: Heads, *, has_state: bool = False) -> KernelMemory:
    """Of `chunked` or `fla`; operands are q, k, v and the log decay.

    `has_state`: rows start from a state that somebody else keeps.
    """
    return _fla(heads, has_state) if kernel == "fla" else _chunked(heads, has_state)


_QKV = frozenset({"q", "k", "v"})


def _banded(heads: Heads, window: int, sinks: SinkSizes) -> KernelMemory:
    """Of `models.kernels.blocked`: the first window as one causal call, then groups of bands."""
    rows = heads.rows
    share = heads.num_queries // heads.num_keys
    later = heads.length - window
    block, group = band_geometry(later, window)
    keys = stacked = masks = backward = merging = 0
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
        needed = (bands + copies) * heads.dim * heads.narrow
        needed += _sink_gradients(heads, rows * count, rows * blocks, sinks)
        backward = max(backward, needed)
        merging = max(merging, _merging(heads, rows * count, sinks))
    # The causal call copies the keys and values of its window unless it groups heads itself.
    keys += rows * window if share == 1 else 0
    key_bytes = keys * heads.num_keys * heads.dim * heads.narrow
    query_bytes = heads.query_elements * heads.narrow
    aside = (
        2 * key_bytes
        + stacked * heads.num_queries * heads.dim * heads.narrow * (1 + sinks.scores_apart)
        + masks * heads.narrow
        # Outputs of the pieces, and one sum a query.
        + query_bytes
        + heads.tokens * heads.num_queries * heads.wide
    )
    operands = _QKV if share > 1 else frozenset({"q"})
    # What the kernel returns is not there yet.
    made = (heads.query_elements + 2 * heads.key_elements) * heads.narrow
    scratch = max(query_bytes, merging - query_bytes)
    return KernelMemory(operands, False, aside, scratch, max(0, backward - made))


def _chunked(heads: Heads, has_state: bool) -> KernelMemory:
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
        aside=state * (len(tiling.spans()) - has_state),
        scratch=int(forward) * heads.wide,
        backward_scratch=int(backward) * heads.wide + 2 * state,
    )


def _fla(heads: Heads, has_state: bool) -> KernelMemory:
    """Of `chunk_gla` 0.6: keys, values and float32 gates once a query head, scores in chunks.

    Its backward computes the states of all chunks again, in float32 as all gradients are.
    """
    elements, chunk = heads.query_elements, FLA_CHUNK_TOKENS
    scores = heads.tokens * heads.num_queries * chunk * 4
    states = heads.rows * -(-heads.length // chunk) * heads.num_queries * heads.dim**2
    kept = 2 * elements * heads.narrow + elements * 4 + scores
    if has_state:
        kept += heads.rows * heads.num_queries * heads.dim**2 * 4
    backward = 2 * states * 4 + scores + 5 * elements * 4 + elements * heads.narrow
    return KernelMemory(frozenset({"q"}), False, kept, states * heads.narrow, backward)
