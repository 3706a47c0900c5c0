"""Sink tokens in softmax attention: their keys, their own attention, and the merge that joins both.

The keys of a query are its visible tokens and all sinks. Kernels attend to tokens and to sinks
apart and merge; what a kernel's backward then needs is written where it is called. Shape letters: B
rows, T tokens, S sinks, N query heads, G key-value heads, H head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SinkKeys:
    """Keys and values `[S, G, H]` that every query of every document sees, whatever its window.

    `q` `[B, Tq, N, H]` are the queries that score them where these are not the queries that score
    the tokens (sinks without rotary positions); None is the same queries.
    """

    k: Tensor
    v: Tensor
    q: Tensor | None = None


def merge(tokens: tuple[Tensor, Tensor], sinks: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys, from the output and the log-sum-exp over each of them.

    Args:
        tokens: output `[..., H]` and log-sum-exp `[...]`, natural and in at least float32.
        sinks: the same.

    Returns:
        Output in the outputs' dtype and log-sum-exp.
    """
    (out, lse), (sink_out, sink_lse) = tokens, sinks
    share = torch.sigmoid(sink_lse - lse).unsqueeze(-1)
    merged = torch.lerp(out.to(share.dtype), sink_out.to(share.dtype), share)
    return merged.to(out.dtype), torch.logaddexp(lse, sink_lse)


def sink_attention(q: Tensor, sinks: SinkKeys, *, scale: float) -> Tensor:
    """Attention of the sinks to each other, without a mask: `[1, S, N, H]` of q `[1, S, N, H]`.

    One function for every kernel set: S is small, and torch's fused kernels need no help here.
    """
    group = q.shape[2] // sinks.k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1).transpose(0, 1)[None] for x in (sinks.k, sinks.v))
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, scale=scale).transpose(1, 2)
