"""Gated linear attention on GPUs: flash-linear-attention's Triton kernels behind our signature.

Owns the translation only: documents to `cu_seqlens`, one state per KV head to one per query head
and back. The library is imported when a kernel is chosen, never before. Shape letters: B rows, T
tokens, N query heads, G key-value heads, R = N / G, H head dim, S documents.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from models.kernels import chunked
from models.kernels.fallback import warn_once
from models.sequence import SequenceContext

# Up to here the recurrent kernel does less work than one padded chunk.
_RECURRENT_TOKENS = 16


def require() -> None:
    """Check that the library can be imported.

    Raises:
        ValueError: flash-linear-attention or Triton is not installed.
    """
    try:
        import fla.ops.gla  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"linear ('fla') must have flash-linear-attention and triton installed: got {error}. "
            "Install synfire[gpu], or choose linear='chunked'."
        ) from error


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
    """Gated linear attention by FLA; arguments and results as `models.reference.linear_attention`.

    The gate and the states are float32. Triton multiplies no float64 matrices, so float64 inputs
    go to the chunked kernel, with a warning.
    """
    if torch.float64 in (q.dtype, log_decay.dtype):
        warn_once("linear='fla'", torch.float64, "linear='chunked'")
        return chunked.linear_attention(
            q, k, v, log_decay, scale=scale, sequence=sequence,
            initial_state=initial_state, document_state=document_state,
            output_final_state=output_final_state,
        )  # fmt: skip
    rows, tokens, heads, _ = q.shape
    group = heads // k.shape[2]
    packed = sequence if sequence and not sequence.is_one_document_per_row else None
    keys, values = (x.to(q.dtype).repeat_interleave(group, dim=2) for x in (k, v))
    operands = [q, keys, values, log_decay.float().repeat_interleave(group, dim=2)]
    state = _entering_states(initial_state, document_state, rows, packed)
    if state is not None:
        state = state.repeat_interleave(group, dim=1)
    if packed is not None:
        operands = [x.flatten(0, 1).unsqueeze(0) for x in operands]
    out, final = _run(operands, scale, state, output_final_state, packed)
    if final is not None:
        # The R query heads of a group hold equal states: the first one stands for all, in memory of
        # its own, so that the others can go.
        last = final if packed is None else final[_last_documents(packed)]
        final = last[:, ::group].contiguous()
    return out.view(rows, tokens, heads, v.shape[3]), final


def _run(
    operands: list[Tensor],
    scale: float,
    state: Tensor | None,
    output_final_state: bool,
    packed: SequenceContext | None,
) -> tuple[Tensor, Tensor | None]:
    """Call the kernel that suits the length on `[B, T, ...]`, with documents on `[1, B T, ...]`."""
    from fla.ops.gla import chunk_gla, fused_recurrent_gla

    q, k, v, gate = (x.contiguous() for x in operands)
    bounds = None if packed is None else packed.cu_seqlens.long()
    longest = q.shape[1] if packed is None else packed.max_length
    common = {
        "scale": scale,
        "initial_state": state,
        "output_final_state": output_final_state,
        "cu_seqlens": bounds,
    }
    result: tuple[Tensor, Tensor | None]
    if longest <= _RECURRENT_TOKENS:
        result = fused_recurrent_gla(q, k, v, gk=gate, **common)
    else:
        # Lengths known on the host spare the library a device synchronisation.
        on_host = None if packed is None else torch.tensor([0, *accumulate(packed.lengths)])
        result = chunk_gla(q, k, v, g=gate, cu_seqlens_cpu=on_host, **common)
    return result


def _entering_states(
    initial_state: Tensor | None,
    document_state: Tensor | None,
    rows: int,
    packed: SequenceContext | None,
) -> Tensor | None:
    """The float32 state `[S, G, H, H]` that enters each document, `[B, G, H, H]` each row.

    A row's first document goes on with `initial_state` where there is one; all others start from
    `document_state`, or from zero.
    """
    if initial_state is None:
        if document_state is None:
            return None
        count = rows if packed is None else len(packed.lengths)
        return document_state.float().expand(count, -1, -1, -1)
    initial = initial_state.float()
    if packed is None:
        return initial
    start = torch.zeros_like(initial[0]) if document_state is None else document_state.float()
    first = torch.tensor(_row_documents(packed)[:-1], device=initial.device)
    return start.expand(len(packed.lengths), -1, -1, -1).index_copy(0, first, initial)


def _last_documents(sequence: SequenceContext) -> list[int]:
    """Index of each row's last document."""
    return [start - 1 for start in _row_documents(sequence)[1:]]


def _row_documents(sequence: SequenceContext) -> list[int]:
    """Index of each row's first document, then S."""
    starts = [0, *accumulate(sequence.lengths)]
    return [index for index, start in enumerate(starts) if start % sequence.num_tokens == 0]
