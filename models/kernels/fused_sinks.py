"""One piece of blocked softmax attention, its tokens and the sinks together.

Owns two exact forms: on CPUs torch's fused kernel for each set of keys, merged in one autograd
function; elsewhere one call with the sinks as its first keys. Queries `[B, N, Tq, H]` score both
sets; `[B, N, Tq, 2H]` are two halves, the first for tokens and the second for sinks. Shape letters:
B rows, Tq queries, Tk keys, S sinks, N query heads, G key-value heads, H head dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels.sinks import SinkKeys, merge

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def takes_causal(q: Tensor) -> bool:
    """Whether a causal piece needs no mask."""
    return q.is_cpu


def attend(  # noqa: PLR0913 - the fused kernel's operands
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: SinkKeys,
    *,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """Attention to the visible tokens and all sinks.

    Args:
        q: `[B, N, Tq, H]`, or `[B, N, Tq, 2H]`: the queries of tokens, then those of sinks.
        k: `[B, G, Tk, H]`; N must be G where `takes_causal` is false.
        v: `[B, G, Tk, H]`.
        sinks: keys and values `[S, G, H]`.
        mask: `[Tq, Tk]`, true where a query sees a token; None is everywhere.
        is_causal: query i sees tokens 0 .. i; only where `takes_causal`, and without a mask.
        scale: factor of the scores.

    Returns:
        `[B, N, Tq, H]` in q's dtype.
    """
    if not takes_causal(q):
        return _in_front(q, k, v, sinks, mask, scale)
    q, k, v = (_with_channels_last(x) for x in (q, k, v))
    first = SinkKeys(*(_with_channels_last(x) for x in (sinks.k, sinks.v)))
    if mask is not None:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float("-inf"))
    out: Tensor = _TokensAndSinks.apply(  # type: ignore[no-untyped-call]
        q, k, v, first.k, first.v, mask, is_causal, scale
    )
    return out


def _with_channels_last(x: Tensor) -> Tensor:
    """The fused kernel reads channels one after the other, whatever it is given."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _in_front(
    q: Tensor, k: Tensor, v: Tensor, sinks: SinkKeys, mask: Tensor | None, scale: float
) -> Tensor:
    """The sinks as first keys of one call; queries in two halves meet keys padded with zeros."""
    first_k, first_v = (_as_rows(x, len(k)) for x in (sinks.k, sinks.v))
    if mask is not None:
        mask = torch.cat([mask.new_ones(len(mask), len(sinks.k)), mask], dim=1)
    if q.shape[-1] != k.shape[-1]:
        first_k, k = F.pad(first_k, (k.shape[-1], 0)), F.pad(k, (0, k.shape[-1]))
    return F.scaled_dot_product_attention(
        q, torch.cat([first_k, k], dim=2), torch.cat([first_v, v], dim=2), mask, scale=scale
    )


def _as_rows(x: Tensor, rows: int) -> Tensor:
    """`[S, G, H]` as `[B, G, S, H]`, without a copy."""
    return x.transpose(0, 1).expand(rows, -1, -1, -1)


def _halves(q: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The queries of tokens and those of sinks."""
    return q[..., :dim], q[..., -dim:]


class _TokensAndSinks(torch.autograd.Function):
    """Two fused calls and their merge.

    The kernel's log-sum-exp carries no gradient, and none is needed: with the merged output and the
    merged log-sum-exp each call's own backward computes the softmax over both sets of keys, and
    thereby the exact gradients of its keys and its share of the queries'.
    """

    @staticmethod
    def forward(  # noqa: PLR0913 - autograd's positional protocol
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink_k: Tensor,
        sink_v: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> Tensor:
        to_tokens, to_sinks = _halves(q, k.shape[-1])
        keys, values = _as_rows(sink_k, len(q)), _as_rows(sink_v, len(q))
        tokens = _forward(to_tokens, k, v, 0.0, is_causal, attn_mask=mask, scale=scale)
        sinks = _forward(to_sinks, keys, values, 0.0, False, scale=scale)
        out, lse = merge(tokens, sinks)
        ctx.save_for_backward(q, k, v, sink_k, sink_v, mask, out, lse)
        ctx.is_causal, ctx.scale = is_causal, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sink_k, sink_v, mask, out, lse = ctx.saved_tensors
        to_tokens, to_sinks = _halves(q, k.shape[-1])
        keys, values = _as_rows(sink_k, len(q)), _as_rows(sink_v, len(q))
        grad = _with_channels_last(grad)
        grad_tokens, grad_k, grad_v = _backward(
            grad, to_tokens, k, v, out, lse, 0.0, ctx.is_causal, attn_mask=mask, scale=ctx.scale
        )
        grad_sinks, grad_keys, grad_values = _backward(
            grad, to_sinks, keys, values, out, lse, 0.0, False, scale=ctx.scale
        )
        if q.shape[-1] == k.shape[-1]:
            grad_q = grad_tokens.add_(grad_sinks)
        else:
            grad_q = torch.cat([grad_tokens, grad_sinks], dim=-1)
        grad_sink_k, grad_sink_v = (x.sum(0).transpose(0, 1) for x in (grad_keys, grad_values))
        return grad_q, grad_k, grad_v, grad_sink_k, grad_sink_v, None, None, None
