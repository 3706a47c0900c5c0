"""Causal softmax attention in plain torch, full or windowed: the CPU path and the fallback.

Memory is linear in T: full attention is torch's fused causal kernel, a window is a band of key
slices around each query block, and documents are attended one length at a time. No mask is ever
larger than one query block by its keys. Sink tokens join each of these pieces where it is attended
(`models.kernels.fused_sinks`). Shape letters: B rows, Tq queries, Tk keys, S sinks, N query heads,
G key-value heads, R = N / G, H head dim.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels import fused_sinks
from models.kernels.sinks import SinkKeys
from models.kernels.tiling import split_dim
from models.sequence import SequenceContext

# Query tokens a block: 128 was the fastest for a window of 512 (64 to 512 measured); wider windows
# take larger blocks, so that the band's gradient holds at most nine copies of the keys.
_MIN_BLOCK, _MAX_BLOCK = 64, 512

# Query tokens whose bands exist at a time: half as many gain nothing, and with more each temporary
# is fresh memory from the system (5 % slower at 16k tokens, 20 % at 64k).
_GROUP_TOKENS = 8192


def softmax_attention(  # noqa: PLR0913 - the signature every softmax attention kernel shares
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    window: int | None,
    sequence: SequenceContext | None,
    sinks: SinkKeys | None = None,
) -> Tensor:
    """Causal softmax attention; equal to `models.reference.softmax_attention`.

    Args:
        q: `[B, Tq, N, H]`.
        k: `[B, Tk, G, H]`, N a multiple of G; with Tk > Tq the queries are the last Tq tokens.
        v: `[B, Tk, G, H]`.
        scale: factor of the scores.
        window: keys a query sees, its own included; None is every earlier key.
        sequence: documents of each row; None is one document a row.
        sinks: keys that every query sees besides.

    Returns:
        `[B, Tq, N, H]` in q's dtype.

    Raises:
        ValueError: fewer keys than queries, or documents with more keys than queries.
    """
    if k.shape[1] < q.shape[1] or (sequence is not None and k.shape[1] != q.shape[1]):
        raise ValueError(
            f"k tokens ({k.shape[1]}) must be q's, or more without documents: got {q.shape[1]}. "
            "Pass sequence=None for cached keys."
        )
    if sinks is not None and sinks.q is not None:
        q = torch.cat([q, sinks.q], dim=-1)
    rule = _Rule(scale, window, sinks)
    if sequence is None or sequence.is_one_document_per_row:
        return _attend(q, k, v, rule)
    return _attend_documents(q, k, v, rule, sequence)


@dataclass(frozen=True, slots=True)
class _Rule:
    """What all pieces of one call have in common.

    Queries that score sinks otherwise than tokens lie behind those of tokens in q's last dim.
    """

    scale: float
    window: int | None
    sinks: SinkKeys | None


def _attend_documents(
    q: Tensor, k: Tensor, v: Tensor, rule: _Rule, sequence: SequenceContext
) -> Tensor:
    """Documents of equal length together, as the rows of one batch."""
    lengths = list(sequence.lengths)
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, length in enumerate(lengths):
        by_length[length].append(index)
    documents = [torch.split(x.flatten(0, 1), lengths) for x in (q, k, v)]
    outputs: dict[int, Tensor] = {}
    for indices in by_length.values():
        stacked = [torch.stack([part[index] for index in indices]) for part in documents]
        attended = _attend(stacked[0], stacked[1], stacked[2], rule)
        outputs.update(zip(indices, attended.unbind(), strict=True))
    return torch.cat([outputs[index] for index in range(len(lengths))]).view(*q.shape[:3], -1)


def _attend(q: Tensor, k: Tensor, v: Tensor, rule: _Rule) -> Tensor:
    """One document a row."""
    num_queries, window = q.shape[1], rule.window
    if window is None or window >= k.shape[1]:
        return _full(q, k, v, rule)
    reach = num_queries + window - 1
    k, v = k[:, -reach:], v[:, -reach:]
    # The first queries see every key there is; each later one sees a whole window.
    first = min(window - (k.shape[1] - num_queries), num_queries)
    outputs = [_full(q[:, :first], k[:, :window], v[:, :window], rule)]
    if first < num_queries:
        outputs += _banded(q[:, first:], k[:, 1:], v[:, 1:], rule, window)
    return torch.cat(outputs, dim=1)


def _full(q: Tensor, k: Tensor, v: Tensor, rule: _Rule) -> Tensor:
    """Causal attention without a window; earlier keys than the first query's are all visible."""
    num_queries, num_keys = q.shape[1], k.shape[1]
    if num_queries == num_keys and (rule.sinks is None or fused_sinks.takes_causal(q)):
        return _causal(q, k, v, rule)
    if num_queries == 1:
        return _masked(q, k, v, rule, None)
    history, outputs = num_keys - num_queries, []
    for start in range(0, num_queries, _MAX_BLOCK):
        stop = min(start + _MAX_BLOCK, num_queries)
        keys = slice(0, history + stop)
        at_key = torch.arange(history + stop, device=q.device)
        at_query = torch.arange(history + start, history + stop, device=q.device)
        visible = at_key[None, :] <= at_query[:, None]
        outputs.append(_masked(q[:, start:stop], k[:, keys], v[:, keys], rule, visible))
    return torch.cat(outputs, dim=1)


def _causal(q: Tensor, k: Tensor, v: Tensor, rule: _Rule) -> Tensor:
    # The CPU kernel groups heads itself; others would fall back to a T x T matrix if asked to.
    grouped = q.is_cpu and q.shape[2] != k.shape[2]
    if not grouped:
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if rule.sinks is not None:
        out = fused_sinks.attend(q, k, v, rule.sinks, mask=None, is_causal=True, scale=rule.scale)
    else:
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=rule.scale, enable_gqa=grouped
        )
    return out.transpose(1, 2)


def band_geometry(num_queries: int, window: int) -> tuple[int, int]:
    """Query tokens of a block, and of the blocks whose bands exist at a time."""
    quarter = 1 << (max(window // 4, 1).bit_length() - 1)
    block = min(max(_MIN_BLOCK, quarter), _MAX_BLOCK, num_queries)
    return block, block * max(_GROUP_TOKENS // block, 1)


def _banded(q: Tensor, k: Tensor, v: Tensor, rule: _Rule, window: int) -> list[Tensor]:
    """Queries that each see `window` keys, the first one keys 0 .. window - 1."""
    block, group = band_geometry(q.shape[1], window)
    halo = window - 1
    # Pieces and halos, not slices of k: each slice's gradient would be as long as k itself.
    keys, values = k[:, :halo], v[:, :halo]
    parts = (torch.split(x, group, dim=1) for x in (q, k[:, halo:], v[:, halo:]))
    outputs = []
    for queries, new_keys, new_values in zip(*parts, strict=True):
        keys = torch.cat([keys[:, keys.shape[1] - halo :], new_keys], dim=1)
        values = torch.cat([values[:, values.shape[1] - halo :], new_values], dim=1)
        blocks, rest = divmod(queries.shape[1], block)
        whole = blocks * block
        if blocks:
            outputs.append(_bands(queries[:, :whole], keys, values, rule, window, blocks))
        if rest:
            last = slice(whole, None)
            outputs.append(
                _bands(queries[:, last], keys[:, last], values[:, last], rule, window, 1)
            )
    return outputs


def _bands(  # noqa: PLR0913 - the band's geometry
    q: Tensor, k: Tensor, v: Tensor, rule: _Rule, window: int, blocks: int
) -> Tensor:
    """Equal query blocks, each with the keys from its first query's window to its last query."""
    block = q.shape[1] // blocks
    span = window - 1 + block
    # unfold makes overlapping views: one row's keys are not copied, and its gradient is one linear
    # sum. Channels come last before rows and blocks are joined, or the fused kernel is lost.
    keys, values = (
        x[:, : (blocks - 1) * block + span].unfold(1, span, block).movedim(-1, 2).flatten(0, 1)
        for x in (k, v)
    )
    at_query = torch.arange(window - 1, span, device=q.device)[:, None]
    distance = at_query - torch.arange(span, device=q.device)[None, :]
    visible = (distance >= 0) & (distance < window)
    queries = split_dim(q, 1, (blocks, block)).flatten(0, 1)
    out = _masked(queries, keys, values, rule, visible)
    return split_dim(out, 0, (q.shape[0], blocks)).flatten(1, 2)


def _masked(q: Tensor, k: Tensor, v: Tensor, rule: _Rule, visible: Tensor | None) -> Tensor:
    """Attention under one mask `[Tq, Tk]`; a KV head's queries are rows of one matrix."""
    groups = k.shape[2]
    group = q.shape[2] // groups
    stacked = split_dim(q, 2, (groups, group)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    mask = visible if visible is None else visible.repeat(group, 1)
    if rule.sinks is not None:
        out = fused_sinks.attend(
            stacked, k, v, rule.sinks, mask=mask, is_causal=False, scale=rule.scale
        )
    else:
        out = F.scaled_dot_product_attention(stacked, k, v, attn_mask=mask, scale=rule.scale)
    return split_dim(out, 2, (group, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)
