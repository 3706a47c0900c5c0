"""The algebra of one tile (some rows, some chunks) of chunked gated linear attention.

Inside a chunk the pair (i, j), j < i, weighs `exp(sum of log_decay over j+1..i)`. It is taken at
the one level s = 1, 2, 4, ... where i and j lie in neighbouring sub-blocks of s tokens: there it
is `exp(sum from i's sub-block start to i) * exp(sum from j+1 to the end of j's sub-block)`, a
product of a query factor and a key factor, so every level is one batched matrix product. The two
sums are built by doubling and never subtracted from one another: no exponent is above 0, no mask
is needed before exp, and strong decays (even -inf) keep full precision.

Documents are masks on the scores, on the queries that may read the entering state, and on the keys
that may write the leaving one; a boundary is never a gate. A state that documents start from is
read by the tokens of those that begin in the chunk, and is written to the leaving state by the last
of them.

Shape letters: B rows, G key-value heads, M chunks, C chunk, R query heads a KV head, H head dim.
Within a tile, q is `[B, G, M, C, R, H]`; k, v and log_decay are `[B, G, M, C, H]`.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from models.kernels.tile_factors import Factors, factors_of, halves, score_blocks, sizes
from models.kernels.tiling import Inputs, Workspace


def _diagonal(scores: Tensor) -> Tensor:
    """View `[B, G, M, C, R]` of the scores of each token with itself."""
    return scores.diagonal(0, 3, 5).transpose(3, 4)


def _scores(inputs: Inputs, factors: Factors, work: Workspace) -> Tensor:
    """Decayed products of queries and keys inside each chunk, `[B, G, M, C, R, C]`."""
    q, k = inputs.q, inputs.k
    scores = work.scores(*q.shape[:5], q.shape[3])
    _diagonal(scores).copy_(torch.mul(q, k.unsqueeze(4), out=work.empty("query", *q.shape)).sum(-1))
    for size, level in zip(sizes(q.shape[3]), factors.levels, strict=True):
        queries, keys = _level_operands(inputs, size, level, work)
        if size == 1:
            block = queries.mul_(keys.unsqueeze(5)).sum(-1, keepdim=True)
        else:
            block = torch.bmm(_stack(queries, 3), _stack(keys, 2).mT)
        blocks = score_blocks(scores, size)
        blocks.copy_(block.view(blocks.shape))
    if inputs.masks is not None:
        scores *= inputs.masks.same
    return scores


def _level_operands(
    inputs: Inputs, size: int, level: tuple[Tensor, Tensor], work: Workspace
) -> tuple[Tensor, Tensor]:
    """A level's queries `[B, G, M, C / 2s, s, R, H]` and keys, times their factors."""
    queries, keys = halves(inputs.q, size)[1], halves(inputs.k, size)[0]
    return (
        torch.mul(queries, level[0].unsqueeze(5), out=work.empty("query", *queries.shape)),
        torch.mul(keys, level[1], out=work.empty("key", *keys.shape)),
    )


def _stack(x: Tensor, dims: int) -> Tensor:
    """Matrices for `bmm`: of the last `dims` dims, the last is the column, the rest are the row."""
    shape = x.shape
    return x.reshape(-1, prod(shape[-dims:-1]), shape[-1])


def _states(inputs: Inputs, factors: Factors, state: Tensor, work: Workspace) -> Tensor:
    """States at the chunks' borders `[B, G, M + 1, H, H]`, the entering one first."""
    written = (inputs.k * factors.suffix).mT @ inputs.v
    rows, groups, chunks = written.shape[:3]
    states = work.empty("states", rows, groups, chunks + 1, *written.shape[3:])
    states[:, :, 0] = state
    if factors.start is not None and inputs.document_state is not None:
        written.addcmul_(factors.start[:, :, :, -1].unsqueeze(-1), inputs.document_state[:, None])
    total = factors.total
    for chunk in range(chunks):
        torch.addcmul(
            written[:, :, chunk], total[:, :, chunk], states[:, :, chunk],
            out=states[:, :, chunk + 1],
        )  # fmt: skip
    return states


def forward(inputs: Inputs, state: Tensor, work: Workspace) -> tuple[Tensor, Tensor]:
    """Output `[B, G, M, C, R, H]` and leaving state of a tile entered by `state` `[B, G, H, H]`."""
    q, v = inputs.q, inputs.v
    factors = factors_of(inputs)
    states = _states(inputs, factors, state, work)
    scores = _scores(inputs, factors, work)
    out = work.empty("out", *q.shape)
    flat = _stack(out, 3)
    torch.bmm(_stack(scores, 3), _stack(v, 2), out=flat)
    if factors.start is not None and inputs.document_state is not None:
        reading = torch.mul(q, factors.start.unsqueeze(4), out=work.empty("query", *q.shape))
        out.flatten(2, 4).add_(reading.flatten(2, 4) @ inputs.document_state)
    q *= factors.prefix.unsqueeze(4)
    flat.baddbmm_(_stack(q, 3), _stack(states[:, :, :-1], 2))
    return out, states[:, :, -1].clone()


def backward(
    inputs: Inputs,
    state: Tensor,
    grad_out: Tensor,
    grad_state: Tensor,
    grad_document_state: Tensor | None,
    work: Workspace,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Gradients of (q, k, v, log_decay) and of the entering state, from those of what leaves.

    That of the state that documents start from is added to `grad_document_state`.
    """
    q, k, v = inputs.q, inputs.k, inputs.v
    factors = factors_of(inputs)
    states = _states(inputs, factors, state, work)
    scores = _stack(_scores(inputs, factors, work), 3)
    outer = _stack(grad_out, 3)
    reading = torch.mul(q, factors.prefix.unsqueeze(4), out=work.empty("query", *q.shape))
    leaving, grad_state = _state_gradients(_stack(reading, 3).mT @ outer, factors, grad_state, work)
    grad_v = scores.mT @ outer
    grad_v.baddbmm_(_stack(k * factors.suffix, 2), _stack(leaving, 2))
    grad_k = (v @ leaving.mT).mul_(factors.suffix)
    grad_q = work.empty("grad_q", *q.shape)
    torch.bmm(outer, _stack(states[:, :, :-1], 2).mT, out=_stack(grad_q, 3))
    grad_q *= factors.prefix.unsqueeze(4)
    grad_scores = work.empty("grad_scores", *q.shape[:5], q.shape[3])
    torch.bmm(outer, _stack(v, 2).mT, out=_stack(grad_scores, 3))
    if inputs.masks is not None:
        grad_scores *= inputs.masks.same
    _level_gradients(inputs, factors, grad_scores, (grad_q, grad_k), work)
    if grad_document_state is not None:
        grad_q += _start_gradients(inputs, factors, (grad_out, leaving), grad_document_state, work)

    # A token's product with itself has no decay: it joins after the gate's gradient is taken.
    scratch = torch.mul(q, grad_q, out=work.empty("query", *q.shape))
    grad_exponent = scratch.sum(4).sub_(k * grad_k)
    grad_log_decay = _gate_gradient(inputs, grad_exponent, (states[:, :, 1:] * leaving).sum(-1))
    itself = _diagonal(grad_scores).unsqueeze(-1)
    grad_k += torch.mul(itself, q, out=scratch).sum(4)
    grad_q.addcmul_(itself, k.unsqueeze(4))
    return (grad_q, grad_k, grad_v.view(v.shape), grad_log_decay), grad_state


def _start_gradients(
    inputs: Inputs,
    factors: Factors,
    grads: tuple[Tensor, Tensor],
    grad_document_state: Tensor,
    work: Workspace,
) -> Tensor:
    """Gradient of q through the state that documents start from; adds that state's own.

    `grads` are those of the output and of the states leaving chunks.
    """
    assert factors.start is not None
    assert inputs.document_state is not None
    (grad_out, leaving), q = grads, inputs.q
    factor, outer = factors.start.unsqueeze(4), grad_out.flatten(2, 4)
    reading = torch.mul(q, factor, out=work.empty("query", *q.shape)).flatten(2, 4)
    grad_document_state += (reading.mT @ outer).sum(0)
    grad_document_state += (factors.start[:, :, :, -1].unsqueeze(-1) * leaving).sum((0, 2))
    return (outer @ inputs.document_state.mT).view(q.shape).mul_(factor)


def _gate_gradient(inputs: Inputs, grad_exponent: Tensor, grad_leaving: Tensor) -> Tensor:
    """Gradient of log_decay, summed inside each chunk only: over later queries minus later keys,
    plus the leaving state times its gradient `[B, G, M, H]`.

    The sums over other documents cancel, but for what these read of the state that they start from.
    """
    chunk = grad_exponent.shape[3]
    later = torch.ones(chunk, chunk, dtype=grad_exponent.dtype, device=grad_exponent.device).triu()
    leaving = grad_leaving.unsqueeze(3)
    if inputs.document_state is None or inputs.masks is None:
        return (later @ grad_exponent).add_(leaving)
    later = later * inputs.masks.same.squeeze(4)
    return (later @ grad_exponent).addcmul_(leaving, inputs.masks.leaves.to(leaving.dtype))


def _state_gradients(
    read: Tensor, factors: Factors, grad_state: Tensor, work: Workspace
) -> tuple[Tensor, Tensor]:
    """Gradients of the states leaving chunks `[B, G, M, H, H]` and of the one entering the tile."""
    total = factors.total
    rows, groups, chunks, dim = total.shape[:4]
    read = read.view(rows, groups, chunks, dim, -1)
    leaving = work.empty("leaving", *read.shape)
    for chunk in reversed(range(chunks)):
        leaving[:, :, chunk] = grad_state
        grad_state = torch.addcmul(read[:, :, chunk], total[:, :, chunk], grad_state)
    return leaving, grad_state


def _level_gradients(
    inputs: Inputs,
    factors: Factors,
    grad_scores: Tensor,
    grads: tuple[Tensor, Tensor],
    work: Workspace,
) -> None:
    """Add to the gradients of q and k what the scores of different tokens give them."""
    for size, level in zip(sizes(inputs.q.shape[3]), factors.levels, strict=True):
        queries, keys = _level_operands(inputs, size, level, work)
        grad_queries, grad_keys = halves(grads[0], size)[1], halves(grads[1], size)[0]
        blocks = score_blocks(grad_scores, size)
        if size == 1:
            grad_keys.add_(torch.mul(queries, blocks, out=queries).sum(5))
            torch.mul(blocks, keys.unsqueeze(5), out=queries)
        else:
            block = _stack(work.empty("block", *blocks.shape).copy_(blocks), 3)
            to_keys = torch.bmm(block.mT, _stack(queries, 3))
            grad_keys.addcmul_(to_keys.view(keys.shape), level[1])
            torch.bmm(block, _stack(keys, 2), out=_stack(queries, 3))
        grad_queries.addcmul_(queries, level[0].unsqueeze(5))
