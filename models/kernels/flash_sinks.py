"""Sink tokens with flash-attn's variable-length kernel: two calls, merged in one autograd function.

Calls the library's functions below its own autograd, with their names and arguments of its releases
2.7 and 2.8. Rows are flattened. Shape letters: B rows, T tokens, S sinks, N query heads, G
key-value heads, H head dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels.sinks import SinkKeys, merge

# Queries that read one copy of the sinks: the library's backward runs once over all queries of a
# sequence for each block of its keys, so one copy for all would leave most of a GPU idle.
QUERIES_A_COPY = 1024

# What the functions below the library's autograd want to be told, and we never use.
_UNUSED = {"dropout_p": 0.0, "softcap": 0.0, "alibi_slopes": None}


def attend(
    operands: list[Tensor],
    sinks: SinkKeys,
    documents: dict[str, Any],
    window_size: tuple[int, int],
) -> Tensor:
    """Attention `[B T, N, H]` to the visible tokens and all sinks.

    Args:
        operands: q `[B T, N, H]`, k and v `[B T, G, H]`.
        sinks: keys and values, and queries `[B, T, N, H]` where they differ from q.
        documents: the library's arguments that describe documents, order and scale.
        window_size: tokens to the left and to the right of a query's own, in the library's words.
    """
    documents = documents | {
        "window_size_left": window_size[0],
        "window_size_right": window_size[1],
    }
    queries = operands[0] if sinks.q is None else sinks.q.flatten(0, 1)
    operands = [*operands, queries, sinks.k, sinks.v]
    dim = queries.shape[-1]
    if dim % 8:
        # Below its autograd the library takes whole groups of eight channels.
        operands = [F.pad(x, (0, -dim % 8)) for x in operands]
    out: Tensor = _TokensAndSinks.apply(*operands, documents)  # type: ignore[no-untyped-call]
    return out[..., :dim]


class _TokensAndSinks(torch.autograd.Function):
    """Two calls of the library and their merge.

    Its log-sum-exp carries no gradient: each call's backward gets the merged output and log-sum-exp
    instead, as in `models.kernels.fused_sinks`.
    """

    @staticmethod
    def forward(  # noqa: PLR0913 - autograd's positional protocol
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink_q: Tensor,
        sink_k: Tensor,
        sink_v: Tensor,
        documents: dict[str, Any],
    ) -> Tensor:
        copies = _copies(sink_q, sink_k, documents["softmax_scale"])
        tokens = _forward(q, k, v, documents)
        sinks = _forward(sink_q, *_repeated(sink_k, sink_v, copies), copies)
        out, lse = merge(tokens, sinks)
        ctx.save_for_backward(q, k, v, sink_q, sink_k, sink_v, out, lse)
        ctx.documents, ctx.copies = documents, copies
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sink_q, sink_k, sink_v, out, lse = ctx.saved_tensors
        merged = grad.contiguous(), out, lse
        tokens = _backward(merged, (q, k, v), ctx.documents)
        keys, values = _repeated(sink_k, sink_v, ctx.copies)
        grad_q, *grads = _backward(merged, (sink_q, keys, values), ctx.copies)
        sinks = [x.view(-1, *sink_k.shape).sum(0) for x in grads]
        return *tokens, grad_q, *sinks, None


def _copies(q: Tensor, k: Tensor, scale: float) -> dict[str, Any]:
    """Arguments that cut the queries into pieces, each with a copy of all sinks and no mask."""
    queries, sinks = len(q), len(k)
    pieces = -(-queries // QUERIES_A_COPY)
    bounds = torch.arange(pieces + 1, dtype=torch.int32, device=q.device)
    return {
        "cu_seqlens_q": (bounds * QUERIES_A_COPY).clamp(max=queries),
        "cu_seqlens_k": bounds * sinks,
        "max_seqlen_q": min(queries, QUERIES_A_COPY),
        "max_seqlen_k": sinks,
        "softmax_scale": scale,
        "causal": False,
        "window_size_left": -1,
        "window_size_right": -1,
    }


def _repeated(k: Tensor, v: Tensor, copies: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The sinks' keys and values once a piece of queries."""
    pieces = len(copies["cu_seqlens_k"]) - 1
    return k.repeat(pieces, 1, 1), v.repeat(pieces, 1, 1)


def _forward(q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Output `[B T, N, H]` and log-sum-exp `[B T, N]`; the library's is `[N, B T]`."""
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

    out, lse, *_ = _flash_attn_varlen_forward(q, k, v, **arguments, **_UNUSED)
    return out, lse.transpose(0, 1)


def _backward(
    merged: tuple[Tensor, Tensor, Tensor],
    operands: tuple[Tensor, Tensor, Tensor],
    arguments: dict[str, Any],
) -> list[Tensor]:
    """Gradients of q, k and v from those of the output, the output and its log-sum-exp."""
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    grad, out, lse = merged
    grads = [torch.empty_like(x) for x in operands]
    _flash_attn_varlen_backward(
        grad, *operands, out, lse.transpose(0, 1).contiguous(), *grads,
        **arguments, **_UNUSED, deterministic=False,
    )  # fmt: skip
    return grads
