"""Slow, obvious definitions of both mixers' mathematics. Every fast kernel is tested against these.

Written for reading and for float64 oracles; differentiable by plain autograd, never used in a run.
Shape letters: B batch, T tokens, S sinks, N query heads, G key-value heads, H head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.kernels.sinks import SinkKeys
from models.sequence import SequenceContext


def linear_attention(  # noqa: PLR0913 - the signature every linear attention kernel shares
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    sequence: SequenceContext | None,
    initial_state: Tensor | None = None,
    document_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Gated linear attention, one step of the recurrence at a time.

    Per head: `S_t = exp(log_decay_t) * S_{t-1} + k_t^T v_t` (decay on the key rows) and
    `o_t = scale * q_t S_t` (SpikingBrain report, equations 10-11). With each document the state
    restarts at `document_state`, or at zero.

    Args:
        q: `[B, T, N, H]`, N a multiple of G; query head n reads the state of head `n // (N / G)`.
        k: `[B, T, G, H]`.
        v: `[B, T, G, H]`.
        log_decay: `[B, T, G, H]`, at most 0, natural log of the decay of each key channel.
        scale: factor of the output.
        sequence: documents of each row; None is one document a row.
        initial_state: `[B, G, H, H]` (key, value) entering the first document of each row, which
            goes on with it instead of restarting.
        document_state: `[G, H, H]` that every other document starts from; None is zero.
        output_final_state: whether the state after the last document of each row is returned.

    Returns:
        The output `[B, T, N, H]` in q's dtype, and the final state in at least float32 or None.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    rows, tokens, heads, dim = q.shape
    groups = k.shape[2]
    queries = q.to(dtype).reshape(rows, tokens, groups, heads // groups, dim)
    decay = log_decay.to(dtype).exp()
    start = q.new_zeros(groups, dim, dim, dtype=dtype)
    if document_state is not None:
        start = document_state.to(dtype)
    start = start.expand(rows, -1, -1, -1)
    state = start if initial_state is None else initial_state.to(dtype)
    outputs = []
    for step in range(tokens):
        if sequence is not None and step > 0:
            starts = sequence.positions[:, step] == 0
            state = torch.where(starts[:, None, None, None], start, state)
        update = k[:, step, :, :, None].to(dtype) * v[:, step, :, None, :].to(dtype)
        state = decay[:, step, :, :, None] * state + update
        outputs.append(scale * torch.einsum("bgqk,bgkv->bgqv", queries[:, step], state))
    out = torch.stack(outputs, dim=1).reshape(rows, tokens, heads, dim).to(q.dtype)
    return out, state if output_final_state else None


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
    """Causal softmax attention through a dense mask.

    Args:
        q: `[B, Tq, N, H]`; with Tq < Tk the queries are the last Tq tokens (not with documents).
        k: `[B, Tk, G, H]`, N a multiple of G.
        v: `[B, Tk, G, H]`.
        scale: factor of the scores.
        window: keys a query sees, itself included; None is all earlier keys.
        sequence: documents of each row; None is one document a row.
        sinks: keys that every query sees besides, in every document.

    Returns:
        The output `[B, Tq, N, H]` in q's dtype.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    num_queries, num_keys, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    keys = k.to(dtype).repeat_interleave(group, dim=2)
    values = v.to(dtype).repeat_interleave(group, dim=2)
    at_query = torch.arange(num_keys - num_queries, num_keys, device=q.device)[:, None]
    at_key = torch.arange(num_keys, device=q.device)[None, :]
    visible = (at_key <= at_query)[None]
    if window is not None:
        visible = visible & (at_query - at_key < window)[None]
    if sequence is not None:
        ids = sequence.document_ids
        visible = visible & (ids[:, :, None] == ids[:, None, :])
    scores = scale * torch.einsum("bqnh,bknh->bnqk", q.to(dtype), keys)
    scores = scores.masked_fill(~visible[:, None], float("-inf"))
    if sinks is not None:
        queries = q if sinks.q is None else sinks.q
        sink_k, sink_v = (x.to(dtype).repeat_interleave(group, dim=1) for x in (sinks.k, sinks.v))
        to_sinks = scale * torch.einsum("bqnh,snh->bnqs", queries.to(dtype), sink_k)
        scores = torch.cat([to_sinks, scores], dim=-1)
        values = torch.cat([sink_v.expand(len(values), -1, -1, -1), values], dim=1)
    return torch.einsum("bnqk,bknh->bqnh", scores.softmax(dim=-1), values).to(q.dtype)
