"""Softmax attention on GPUs by torch's compiled flex attention with a block mask.

Owns the mask of documents and window and its reuse by all layers of a step; compiles on first use.
Shape letters: B rows, Tq queries, Tk keys, S sinks, N query heads, G key-value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from models.kernels import blocked
from models.kernels.fallback import warn_once
from models.kernels.sinks import SinkKeys, merge
from models.sequence import SequenceContext

_MaskKey = tuple[int, int, int | None, torch.device]


def require() -> None:
    """Check that flex attention can be compiled here.

    Raises:
        ValueError: this torch has no flex attention, or Triton is not installed.
    """
    try:
        import triton  # noqa: F401
        from torch.nn.attention.flex_attention import flex_attention  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"softmax ('flex') must have torch's flex attention and triton: got {error}. "
            "Install synfire[gpu], or choose softmax='blocked'."
        ) from error


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
    """Causal softmax attention by flex attention; as `models.reference.softmax_attention`.

    Triton multiplies no float64 matrices, so float64 inputs go to the blocked kernel, with a
    warning; a single query (decoding) goes there too, where nothing would be gained.
    """
    if q.dtype is torch.float64:
        warn_once("softmax='flex'", q.dtype, "softmax='blocked'")
    if q.dtype is torch.float64 or q.shape[1] == 1:
        return blocked.softmax_attention(
            q, k, v, scale=scale, window=window, sequence=sequence, sinks=sinks
        )
    packed = sequence is not None and not sequence.is_one_document_per_row
    ids = sequence.document_ids if packed and sequence is not None else None
    key = (q.shape[1], k.shape[1], window, q.device)
    mask = _shared_mask(key) if ids is None else _document_mask(key, ids)
    if sinks is None:
        attended: Tensor = _run((q, k, v), mask, scale)
        return attended.transpose(1, 2)
    return _with_sinks((q, k, v), mask, scale, sinks)


def _run(operands: tuple[Tensor, Tensor, Tensor], mask: Any, scale: float, **options: Any) -> Any:
    """The compiled attention of `[B, T, heads, H]` operands, `[B, N, Tq, H]`."""
    q, k, v = operands
    return _compiled()[0](
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        block_mask=mask,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
        **options,
    )


def _with_sinks(
    operands: tuple[Tensor, Tensor, Tensor], mask: Any, scale: float, sinks: SinkKeys
) -> Tensor:
    """Attention to tokens and to sinks, merged by autograd: this log-sum-exp is differentiable."""
    from torch.nn.attention.flex_attention import AuxRequest

    lse = AuxRequest(lse=True)
    out, aux = _run(operands, mask, scale, return_aux=lse)
    tokens = out.transpose(1, 2), aux.lse.transpose(1, 2)
    queries = operands[0] if sinks.q is None else sinks.q
    # All rows as one, because sinks are the same for each.
    flat = (queries.flatten(0, 1)[None], sinks.k[None], sinks.v[None])
    sink_out, sink_aux = _run(flat, None, scale, return_aux=lse)
    sink_out, sink_lse = (
        x[0].transpose(0, 1).unflatten(0, queries.shape[:2]) for x in (sink_out, sink_aux.lse)
    )
    return merge(tokens, (sink_out, sink_lse))[0]


# Batches in flight (pipelined or recomputed) times kinds of mask. A kept mask holds its ids, so
# their address stays theirs.
_KEPT_MASKS = 16


@cache
def _compiled() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The attention and the mask builder, compiled: eager, both would hold a Tq x Tk matrix."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # fullgraph: past torch's limit of recompilations this raises, where the default would go on
    # with the eager forms.
    return (
        torch.compile(flex_attention, fullgraph=True),
        torch.compile(create_block_mask, fullgraph=True),
    )


@lru_cache(maxsize=_KEPT_MASKS)
def _shared_mask(key: _MaskKey) -> Any:
    """Mask of rows that are one document each; it depends on sizes only."""
    return _build(key, None)


_recent: dict[tuple[int, _MaskKey], Any] = {}


def _document_mask(key: _MaskKey, document_ids: Tensor) -> Any:
    """Mask of one packed batch, built once for all of its layers; the oldest goes first."""
    owner = (id(document_ids), key)
    if owner not in _recent:
        if len(_recent) >= _KEPT_MASKS:
            del _recent[next(iter(_recent))]
        _recent[owner] = _build(key, document_ids)
    return _recent[owner]


def _build(key: _MaskKey, document_ids: Tensor | None) -> Any:
    num_queries, num_keys, window, device = key
    rows = None if document_ids is None else document_ids.shape[0]
    mask = _mask_function(num_keys - num_queries, window, document_ids)
    return _compiled()[1](mask, rows, None, num_queries, num_keys, device=device)


def _mask_function(
    history: int, window: int | None, document_ids: Tensor | None
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Whether a query sees a key, by their indices; queries are the last ones of the keys."""

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = query + history - key
        seen = distance >= 0
        if window is not None:
            seen = seen & (distance < window)
        if document_ids is not None:
            seen = seen & (document_ids[row, query] == document_ids[row, key])
        return seen

    return visible
