"""Bytes of a mixer: the operations of `models.mixer` and of both cores, written on a tape.

Shape letters: T tokens of the microbatch, D hidden, N query heads, G key-value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

from models.config import ModelConfig
from models.kernel_memory import KernelMemory, linear_memory, softmax_memory
from models.layer_pattern import MixerKind, Mixers
from models.memory_tape import Tape, Value
from models.mixer_config import BranchMerge, BranchNorm, BranchProjections, GateKind
from models.operation_memory import (
    Again,
    Workload,
    column,
    neuron,
    norm,
    norm_and_enter,
    row,
    widened,
)

_Heads = tuple[Value, Value, Value]


def num_output_projections(model: ModelConfig, mixers: Mixers) -> int:
    """How many products lead a layer's heads back to the residual stream."""
    return 1 if len(mixers) > 1 and _meets_before(model) and _is_shared(model) else len(mixers)


def has_head_norm(model: ModelConfig, mixers: Mixers) -> bool:
    """Whether any head outputs of a layer are normed."""
    return MixerKind.linear in mixers or (len(mixers) > 1 and _meets_before(model))


def _meets_before(model: ModelConfig) -> bool:
    return model.branches.norm is BranchNorm.before_output


def _is_shared(model: ModelConfig) -> bool:
    return model.branches.projections is BranchProjections.shared


def mixer(tape: Tape, x: Value, mixers: Mixers, work: Workload, again: Again) -> Value:
    """The block's first norm, then `models.mixer.Mixer`."""
    is_parallel = len(mixers) > 1
    is_shared = not is_parallel or _is_shared(work.model)
    meets_before = is_parallel and _meets_before(work.model)
    normed, x = norm_and_enter(tape, x, work, again)
    heads = [_project(tape, x, work) for _ in range(1 if is_shared else len(mixers))]
    gates = [_low_rank_gate(tape, x, work, again) if _has_gate(kind, work) else None
             for kind in mixers]  # fmt: skip
    with tape.computed_again(again.mixer):
        heads = [_norm_heads(tape, each, work) for each in heads] * (len(mixers) // len(heads))
        mixed = [_core(tape, kind, own, gate, work)
                 for kind, own, gate in zip(mixers, heads, gates, strict=True)]  # fmt: skip
    is_normed = has_head_norm(work.model, mixers)
    with tape.computed_again(again.mixer or (is_normed and again.norms)):
        rows = work.tokens * work.heads.num_queries
        outs = [
            norm(tape, out, rows, work) if meets_before or kind is MixerKind.linear else out
            for kind, out in zip(mixers, mixed, strict=True)
        ]
        if meets_before:
            outs = _meet(tape, outs, work, adds=is_shared)
        encoded = [neuron(tape, out, work.tokens, work) for out in outs]
    width = work.heads.num_queries * work.heads.dim
    holds = [normed, *outs]
    projected = [
        row(tape, each, width, work, bias=work.model.output_bias, holds=holds) for each in encoded
    ]
    if is_parallel and not meets_before:
        with tape.computed_again(again.norms):
            projected = [norm(tape, each, work.stream_tokens, work) for each in projected]
            projected = _meet(tape, projected, work, adds=True)
    return _sum(tape, projected)


def _has_gate(kind: MixerKind, work: Workload) -> bool:
    return kind is MixerKind.linear and work.model.linear.gate is GateKind.low_rank


def _project(tape: Tape, x: Value, work: Workload) -> _Heads:
    """`models.projections.HeadProjections.heads`."""
    heads, bias = work.heads, work.model.qkv_bias
    keys = heads.num_keys * heads.dim
    q = column(tape, x, heads.num_queries * heads.dim, work, bias=bias)
    return q, column(tape, x, keys, work, bias=bias), column(tape, x, keys, work, bias=bias)


def _norm_heads(tape: Tape, heads: _Heads, work: Workload) -> _Heads:
    if not work.model.qk_norm:
        return heads
    q, k, v = heads
    q = norm(tape, q, work.tokens * work.heads.num_queries, work)
    return q, norm(tape, k, work.tokens * work.heads.num_keys, work), v


def _core(tape: Tape, kind: MixerKind, heads: _Heads, gate: Value | None, work: Workload) -> Value:
    if kind is MixerKind.linear:
        return _linear_attention(tape, heads, gate, work)
    window = work.model.visible_window_tokens if kind is MixerKind.sliding_window else None
    memory = softmax_memory(work.kernels[1], work.heads, window)
    q, k, v = heads
    operands = {"q": _rotated(tape, q, work), "k": _rotated(tape, k, work), "v": v}
    return _kernel(tape, operands, memory, work)


def _rotated(tape: Tape, x: Value, work: Workload) -> Value:
    """`models.rotary.rotate`: its tables belong to the model."""
    scratch = x.size // work.narrow * work.wide if work.is_narrow else 0
    return tape.op(x, makes=x.size, scratch=scratch, backward_scratch=scratch)


def _low_rank_gate(tape: Tape, x: Value, work: Workload, again: Again) -> Value:
    """The first half of the gate of `L`, in the wide dtype."""
    rank = work.model.linear.gate_low_rank_dim
    with tape.computed_again(again.norms):
        x = widened(tape, x, work)
    weights = rank * work.model.hidden_size * work.wide
    makes = work.tokens * rank * work.wide
    return tape.op(x, makes=makes, saves=[x], weights=weights, is_product=True)


def _linear_attention(tape: Tape, heads: _Heads, gate: Value | None, work: Workload) -> Value:
    """`models.linear_attention.GatedLinearAttention` from its projections to its kernel."""
    q, k, v = heads
    q = tape.op(q, makes=q.size, saves_output=True)
    if gate is None:
        k, decay = _key_tied_gate(tape, k, work)
    else:
        k = tape.op(k, makes=k.size, saves_output=True)
        decay = _low_rank_decay(tape, gate, work)
    memory = linear_memory(work.kernels[0], work.heads)
    return _kernel(tape, {"q": q, "k": k, "v": v, "log_decay": decay}, memory, work)


def _low_rank_decay(tape: Tape, gate: Value, work: Workload) -> Value:
    keys = work.heads.num_keys * work.heads.dim
    size = work.tokens * keys * work.wide
    weights = (work.model.linear.gate_low_rank_dim + 1) * keys * work.wide
    logits = tape.op(gate, makes=size, saves=[gate], weights=weights, is_product=True)
    return tape.op(_log_sigmoid(tape, logits, work), makes=size)


def _key_tied_gate(tape: Tape, keys: Value, work: Workload) -> tuple[Value, Value]:
    """`models.linear_attention.key_tied_gate`."""
    linear = work.model.linear
    u = widened(tape, keys, work)
    if linear.gate_offset:
        u = tape.op(u, makes=u.size, hands_gradient_on=True)
    decay = _log_sigmoid(tape, tape.op(u, makes=u.size), work)
    key = tape.op(u, makes=u.size, saves_output=True)
    if linear.gate_floor:
        key = tape.op(key, makes=u.size)
        shifted = tape.op(decay, makes=u.size, hands_gradient_on=True)
        decay = tape.op(shifted, makes=u.size, saves=[shifted, work.wide])
    return _narrowed(tape, key, work), decay


def _log_sigmoid(tape: Tape, x: Value, work: Workload) -> Value:
    # torch's CPU kernel of logsigmoid keeps a buffer as large as its input.
    buffer = [x.size] if work.kernels[0] == "chunked" else []
    return tape.op(x, makes=x.size, saves=[x, *buffer])


def _meet(tape: Tape, branches: Sequence[Value], work: Workload, *, adds: bool) -> list[Value]:
    """`models.parallel_branches.BranchWeights`, and the sum or none, in the compute dtype."""
    merge = work.model.branches.merge
    if merge is BranchMerge.learned:
        wide = [widened(tape, each, work) for each in branches]
        weighed = [
            tape.op(x, makes=x.size, saves=[x], weights=work.wide, backward_scratch=x.size)
            for x in wide
        ]
    elif merge is BranchMerge.mean:
        weighed = [tape.op(x, makes=x.size) for x in branches]
    else:
        return [_sum(tape, branches)] if adds else list(branches)
    met = [_sum(tape, weighed)] if adds else weighed
    return [_narrowed(tape, x, work) for x in met] if merge is BranchMerge.learned else met


def _sum(tape: Tape, branches: Sequence[Value]) -> Value:
    first, *others = branches
    for other in others:
        first = tape.op(first, other, makes=first.size, hands_gradient_on=True)
    return first


def _narrowed(tape: Tape, x: Value, work: Workload) -> Value:
    return tape.op(x, makes=x.size // work.wide * work.narrow) if work.is_narrow else x


def _kernel(tape: Tape, operands: dict[str, Value], memory: KernelMemory, work: Workload) -> Value:
    return tape.op(
        *operands.values(),
        makes=work.heads.query_elements * work.narrow,
        saves=[*(operands[name] for name in memory.operands), memory.aside],
        saves_output=memory.keeps_output,
        scratch=memory.scratch,
        backward_scratch=memory.backward_scratch,
        is_product=True,
    )
