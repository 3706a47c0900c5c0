"""The algebra of one tile (some rows, some chunks) of chunked gated linear attention.

Inside a chunk the pair (i, j), j < i, weighs `exp(sum of log_decay over j+1..i)`. It is taken at
the one level s = 1, 2, 4, ... where i and j lie in neighbouring sub-blocks of s tokens: there it
is `exp(sum from i's sub-block start to i) * exp(sum from j+1 to the end of j's sub-block)`, a
product of a query factor and a key factor, so every level is one batched matrix product. The two
sums are built by doubling and never subtracted from one another: no exponent is above 0, no mask
is needed before exp, and strong decays (even -inf) keep full precision.

Documents are masks on the scores, on the queries that may read the entering state, and on the keys
that may write the leaving one; a boundary is never a gate.

Shape letters: B rows, G key-value heads, M chunks, C chunk, R query heads a KV head, H head dim.
Within a tile, q is `[B, G, M, C, R, H]`; k, v and log_decay are `[B, G, M, C, H]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from models.kernels.tiling import Inputs, Workspace, split_dim


@dataclass(frozen=True, slots=True)
class _Factors:
    """Exponentials of one tile: per level (query, key), of the chunk's prefix and suffix sums."""

    levels: list[tuple[Tensor, Tensor]]
    prefix: Tensor
    suffix: Tensor

    @property
    def total(self) -> Tensor:
        """What is left of the entering state at the chunk's end, `[B, G, M, H, 1]`."""
        return self.prefix[:, :, :, -1].unsqueeze(-1)


def _factors(inputs: Inputs) -> _Factors:
    prefix = inputs.log_decay.clone()
    suffix = torch.zeros_like(prefix)
    levels = []
    for size in _sizes(prefix.shape[3]):
        key_prefix, query_prefix = _halves(prefix, size)
        key_suffix, _ = _halves(suffix, size)
        levels.append((query_prefix.exp(), key_suffix.exp()))
        key_suffix += query_prefix[..., -1:, :]
        query_prefix += key_prefix[..., -1:, :]
    prefix, suffix = prefix.exp_(), suffix.exp_()
    if inputs.masks is not None:
        prefix *= inputs.masks.enters
        suffix *= inputs.masks.leaves
    return _Factors(levels, prefix, suffix)


def _sizes(chunk: int) -> list[int]:
    return [1 << level for level in range(chunk.bit_length() - 1)]


def _halves(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Views of the key and the query sub-blocks of a level: `[B, G, M, C / 2s, s, ...]` each."""
    pairs = split_dim(x, 3, (-1, 2, size))
    return pairs[:, :, :, :, 0], pairs[:, :, :, :, 1]


def _score_blocks(scores: Tensor, size: int) -> Tensor:
    """View of a level's blocks `[B, G, M, C / 2s, s, R, s]` of scores `[B, G, M, C, R, C]`."""
    pairs = split_dim(split_dim(scores, 5, (-1, 2, size)), 3, (-1, 2, size))
    return pairs[:, :, :, :, 1, :, :, :, 0].diagonal(0, 3, 6).movedim(-1, 3)


def _diagonal(scores: Tensor) -> Tensor:
    """View `[B, G, M, C, R]` of the scores of each token with itself."""
    return scores.diagonal(0, 3, 5).transpose(3, 4)


def _scores(inputs: Inputs, factors: _Factors, work: Workspace) -> Tensor:
    """Decayed products of queries and keys inside each chunk, `[B, G, M, C, R, C]`."""
    q, k = inputs.q, inputs.k
    scores = work.scores(*q.shape[:5], q.shape[3])
    _diagonal(scores).copy_(torch.mul(q, k.unsqueeze(4), out=work.empty("query", *q.shape)).sum(-1))
    for size, level in zip(_sizes(q.shape[3]), factors.levels, strict=True):
        queries, keys = _level_operands(inputs, size, level, work)
        if size == 1:
            block = queries.mul_(keys.unsqueeze(5)).sum(-1, keepdim=True)
        else:
            block = torch.bmm(_stack(queries, 3), _stack(keys, 2).mT)
        blocks = _score_blocks(scores, size)
        blocks.copy_(block.view(blocks.shape))
    if inputs.masks is not None:
        scores *= inputs.masks.same
    return scores


def _level_operands(
    inputs: Inputs, size: int, level: tuple[Tensor, Tensor], work: Workspace
) -> tuple[Tensor, Tensor]:
    """A level's queries `[B, G, M, C / 2s, s, R, H]` and keys, times their factors."""
    queries, keys = _halves(inputs.q, size)[1], _halves(inputs.k, size)[0]
    return (
        torch.mul(queries, level[0].unsqueeze(5), out=work.empty("query", *queries.shape)),
        torch.mul(keys, level[1], out=work.empty("key", *keys.shape)),
    )


def _stack(x: Tensor, dims: int) -> Tensor:
    """Matrices for `bmm`: of the last `dims` dims, the last is the column, the rest are the row."""
    shape = x.shape
    return x.reshape(-1, prod(shape[-dims:-1]), shape[-1])


def _states(inputs: Inputs, factors: _Factors, state: Tensor, work: Workspace) -> Tensor:
    """States at the chunks' borders `[B, G, M + 1, H, H]`, the entering one first."""
    written = (inputs.k * factors.suffix).mT @ inputs.v
    rows, groups, chunks = written.shape[:3]
    states = work.empty("states", rows, groups, chunks + 1, *written.shape[3:])
    states[:, :, 0] = state
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
    factors = _factors(inputs)
    states = _states(inputs, factors, state, work)
    scores = _scores(inputs, factors, work)
    out = work.empty("out", *q.shape)
    flat = _stack(out, 3)
    torch.bmm(_stack(scores, 3), _stack(v, 2), out=flat)
    q *= factors.prefix.unsqueeze(4)
    flat.baddbmm_(_stack(q, 3), _stack(states[:, :, :-1], 2))
    return out, states[:, :, -1].clone()


def backward(
    inputs: Inputs, state: Tensor, grad_out: Tensor, grad_state: Tensor, work: Workspace
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Gradients of (q, k, v, log_decay) and of the entering state, from those of what leaves.

    The gate's gradient is summed inside each chunk only: over later queries minus later keys, plus
    the leaving state times its gradient.
    """
    q, k, v = inputs.q, inputs.k, inputs.v
    factors = _factors(inputs)
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

    # A token's product with itself has no decay: it joins after the gate's gradient is taken.
    scratch = torch.mul(q, grad_q, out=work.empty("query", *q.shape))
    grad_exponent = scratch.sum(4).sub_(k * grad_k)
    later = torch.ones(q.shape[3], q.shape[3], dtype=q.dtype, device=q.device).triu()
    grad_log_decay = later @ grad_exponent
    grad_log_decay += (states[:, :, 1:] * leaving).sum(-1).unsqueeze(3)
    itself = _diagonal(grad_scores).unsqueeze(-1)
    grad_k += torch.mul(itself, q, out=scratch).sum(4)
    grad_q.addcmul_(itself, k.unsqueeze(4))
    return (grad_q, grad_k, grad_v.view(v.shape), grad_log_decay), grad_state


def _state_gradients(
    read: Tensor, factors: _Factors, grad_state: Tensor, work: Workspace
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
    factors: _Factors,
    grad_scores: Tensor,
    grads: tuple[Tensor, Tensor],
    work: Workspace,
) -> None:
    """Add to the gradients of q and k what the scores of different tokens give them."""
    for size, level in zip(_sizes(inputs.q.shape[3]), factors.levels, strict=True):
        queries, keys = _level_operands(inputs, size, level, work)
        grad_queries, grad_keys = _halves(grads[0], size)[1], _halves(grads[1], size)[0]
        blocks = _score_blocks(grad_scores, size)
        if size == 1:
            grad_keys.add_(torch.mul(queries, blocks, out=queries).sum(5))
            torch.mul(blocks, keys.unsqueeze(5), out=queries)
        else:
            block = _stack(work.empty("block", *blocks.shape).copy_(blocks), 3)
            to_keys = torch.bmm(block.mT, _stack(queries, 3))
            grad_keys.addcmul_(to_keys.view(keys.shape), level[1])
            torch.bmm(block, _stack(keys, 2), out=_stack(queries, 3))
        grad_queries.addcmul_(queries, level[0].unsqueeze(5))
