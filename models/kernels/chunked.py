"""Exact chunked gated linear attention in plain torch: the kernel of every machine without Triton.

Owns the public function, the state carried from tile to tile, and the single-token step. Tiles are
cut in `models.kernels.tiling`, the algebra of one tile is in `models.kernels.tile`.
Shape letters: B batch, T tokens, N query heads, G key-value heads, R = N / G, H head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels import tile
from models.kernels.tiling import Tiling, Workspace, load, load_heads, store
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
    """Gated linear attention in chunks; equal to `models.reference.linear_attention`.

    `S_t = exp(log_decay_t) S_{t-1} + k_t^T v_t`, `o_t = scale q_t S_t` (SpikingBrain report,
    equations 10-11), one state per KV head shared by its R query heads. Differentiable once, in
    every tensor argument, through the output and the final state.

    Args:
        q: `[B, T, N, H]`.
        k: `[B, T, G, H]`, N a multiple of G.
        v: `[B, T, G, H]`.
        log_decay: `[B, T, G, H]`, at most 0 (-inf forgets everything).
        scale: factor of the output.
        sequence: documents of each row; None is one document a row.
        initial_state: `[B, G, H, H]` entering the first document of each row, which goes on with
            it.
        document_state: `[G, H, H]` that every other document starts from; None is zero.
        output_final_state: whether to return the state after the last document of each row.

    Returns:
        `[B, T, N, H]` in q's dtype, and `[B, G, H, H]` in at least float32 or None.

    Raises:
        ValueError: N is not a multiple of G, or the sequence describes another batch.
    """
    _check(q, k, sequence)
    dtype = torch.promote_types(torch.promote_types(q.dtype, log_decay.dtype), torch.float32)
    if initial_state is None and document_state is not None:
        initial_state = document_state.expand(q.shape[0], -1, -1, -1)
    if q.shape[1] == 1:
        out, state = _step(q, k, v, log_decay.to(dtype), scale, initial_state)
        return out, state if output_final_state else None
    if initial_state is None:
        initial_state = q.new_zeros(q.shape[0], k.shape[2], k.shape[3], v.shape[3], dtype=dtype)
    document_ids = None
    if sequence is not None and not sequence.is_one_document_per_row:
        document_ids = sequence.document_ids
    starts = None
    if document_ids is not None and document_state is not None:
        starts = document_state.to(dtype)
    outputs: tuple[Tensor, Tensor] = _ChunkedLinearAttention.apply(  # type: ignore[no-untyped-call]
        q, k, v, log_decay, initial_state.to(dtype), starts, document_ids, scale
    )
    return outputs[0], outputs[1] if output_final_state else None


def _check(q: Tensor, k: Tensor, sequence: SequenceContext | None) -> None:
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"q heads ({q.shape[2]}) must be a multiple of k heads: got {k.shape[2]}. "
            "Change num_attention_heads or num_key_value_heads."
        )
    if sequence is not None and sequence.document_ids.shape != q.shape[:2]:
        raise ValueError(
            f"sequence ({tuple(sequence.document_ids.shape)}) must have q's rows and tokens: "
            f"got {tuple(q.shape[:2])}. Build it from the same batch."
        )


def _step(  # noqa: PLR0913 - the recurrence's operands
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence, by plain autograd: what decoding calls."""
    rows, _, heads, dim = q.shape
    groups, dtype = k.shape[2], log_decay.dtype
    update = k[:, 0, :, :, None].to(dtype) * v[:, 0, :, None, :].to(dtype)
    if state is None:
        state = update
    else:
        state = torch.addcmul(update, log_decay[:, 0].exp().unsqueeze(-1), state.to(dtype))
    queries = q[:, 0].to(dtype).view(rows, groups, heads // groups, dim) * scale
    return (queries @ state).view(rows, 1, heads, v.shape[3]).to(q.dtype), state


class _ChunkedLinearAttention(torch.autograd.Function):
    """Saves the inputs and the state entering each tile; recomputes everything else."""

    @staticmethod
    def forward(  # noqa: PLR0913 - autograd's positional protocol
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        initial_state: Tensor,
        document_state: Tensor | None,
        document_ids: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        tiling = Tiling.of(q)
        work = Workspace(initial_state)
        out = q.new_empty(*q.shape[:3], v.shape[3])
        final = torch.empty_like(initial_state)
        batch = (q, k, v, log_decay, document_ids)
        entering = []
        for rows in tiling.row_blocks():
            state = initial_state[rows]
            for span in tiling.spans():
                entering.append(state)
                where = (rows, span, tiling.chunk)
                inputs = load(work, batch, where, scale, document_state)
                tile_out, state = tile.forward(inputs, state, work)
                store(tile_out, out[rows, span])
            final[rows] = state
        ctx.save_for_backward(*batch, document_state, *entering)
        ctx.scale, ctx.tiling = scale, tiling
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, document_ids, document_state, *entering = ctx.saved_tensors
        batch = (q, k, v, log_decay, document_ids)
        tiling: Tiling = ctx.tiling
        work = Workspace(grad_final)
        grads = [x.new_empty(x.shape) for x in (q, k, v, log_decay)]
        grad_initial = torch.empty_like(grad_final)
        grad_document = None if document_state is None else torch.zeros_like(document_state)
        spans = tiling.spans()
        for index, rows in enumerate(tiling.row_blocks()):
            grad_state = grad_final[rows]
            for step in reversed(range(len(spans))):
                where = (rows, spans[step], tiling.chunk)
                inputs = load(work, batch, where, ctx.scale, document_state)
                tile_grad = load_heads(work, "grad_out", grad_out, where, k.shape[2])
                state = entering[index * len(spans) + step]
                tile_grads, grad_state = tile.backward(
                    inputs, state, tile_grad, grad_state, grad_document, work
                )
                tile_grads[0].mul_(ctx.scale)
                for source, target in zip(tile_grads, grads, strict=True):
                    store(source, target[rows, spans[step]])
            grad_initial[rows] = grad_state
        return *grads, grad_initial, grad_document, None, None
