"""Softmax attention on GPUs by flash-attn's variable-length kernel behind our signature.

Owns the translation only; the library is imported when the kernel is chosen. Shape letters: B rows,
Tq queries, Tk keys, S sinks, N query heads, G key-value heads, H head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.kernels import blocked, flash_sinks
from models.kernels.fallback import warn_once
from models.kernels.sinks import SinkKeys
from models.sequence import SequenceContext

_DTYPES = (torch.float16, torch.bfloat16)


def require() -> None:
    """Check that the library can be imported.

    Raises:
        ValueError: flash-attn is not installed.
    """
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"softmax ('flash_attn') must have flash-attn installed: got {error}. "
            "Install flash-attn, or choose softmax='flex' or 'blocked'."
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
    """Causal softmax attention by flash-attn; as `models.reference.softmax_attention`.

    Half precision only (it accumulates in float32); wider inputs go to the blocked kernel, with a
    warning.
    """
    if q.dtype not in _DTYPES:
        warn_once("softmax='flash_attn'", q.dtype, "softmax='blocked'")
        return blocked.softmax_attention(
            q, k, v, scale=scale, window=window, sequence=sequence, sinks=sinks
        )
    from flash_attn import flash_attn_varlen_func

    query_bounds, longest_query = _bounds(q, sequence)
    key_bounds, longest_key = _bounds(k, sequence)
    operands = [x.flatten(0, 1) for x in (q, k, v)]
    documents = {
        "cu_seqlens_q": query_bounds,
        "cu_seqlens_k": key_bounds,
        "max_seqlen_q": longest_query,
        "max_seqlen_k": longest_key,
        "softmax_scale": scale,
        "causal": True,
    }
    # The library counts the keys to the left, we count the query's own as well.
    size = (-1, -1) if window is None else (window - 1, 0)
    if sinks is not None:
        out = flash_sinks.attend(operands, sinks, documents, size)
    else:
        out = flash_attn_varlen_func(*operands, **documents, window_size=size)
    return out.view(q.shape)


def _bounds(x: Tensor, sequence: SequenceContext | None) -> tuple[Tensor, int]:
    """Document borders in the flattened `[B, T]` of x, and the longest document."""
    if sequence is not None:
        return sequence.cu_seqlens, sequence.max_length
    rows, tokens = x.shape[:2]
    bounds = torch.arange(0, rows * tokens + 1, tokens, dtype=torch.int32, device=x.device)
    return bounds, tokens
