"""Bytes of mixer cores: the operations of `models.softmax_attention` and `models.linear_attention`.

From projected heads, normed where the model does so, to head outputs: of tokens, and of sinks among
themselves with what tokens see of them. Shape letters: T tokens of the microbatch, S sinks, N query
heads, G key-value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

from models.kernel_memory import KernelMemory, SinkSizes, linear_memory, softmax_memory
from models.layer_pattern import MixerKind
from models.memory_tape import Tape, Value
from models.mixer_config import SinkRope
from models.operation_memory import Workload, widened

Heads = tuple[Value, Value, Value]
"""Queries, keys and values."""
Seen = tuple[Value, ...]
"""What tokens see of sinks: keys and values (F, S), or one state (L); nothing without sinks."""


def attend(  # noqa: PLR0913 - what a core reads
    tape: Tape, kind: MixerKind, heads: Heads, gate: Value | None, work: Workload, seen: Seen = ()
) -> Value:
    """`MixerCore.attend`."""
    if kind is MixerKind.linear:
        operands = _linear_operands(tape, heads, gate, work)
        memory = linear_memory(work.kernels[0], work.heads, has_state=bool(seen))
        return _kernel(tape, operands, memory, work, seen)
    window = work.model.visible_window_tokens if kind is MixerKind.sliding_window else None
    q, k, v = heads
    operands = {"q": _rotated(tape, q, work), "k": _rotated(tape, k, work), "v": v}
    sinks = None
    if seen:
        scores_apart = work.model.sinks.rope is SinkRope.none
        sinks = SinkSizes(work.model.sinks.num_tokens, scores_apart=scores_apart)
        if scores_apart:
            operands |= _other_queries(tape, operands["q"], q, work)
    memory = softmax_memory(work.kernels[1], work.heads, window, sinks)
    return _kernel(tape, operands, memory, work, seen)


def attend_sinks(
    tape: Tape, kind: MixerKind, heads: Heads, gate: Value | None, work: Workload, rope: SinkRope
) -> tuple[Value, Seen]:
    """`MixerCore.attend_sinks`; `work` is that of sinks."""
    if kind is MixerKind.linear:
        return _linear_sinks(tape, _linear_operands(tape, heads, gate, work), work)
    q, k, v = heads
    if rope is not SinkRope.none:
        q, k = _rotated(tape, q, work), _rotated(tape, k, work)
    # Once a query head.
    keys, values = tape.op(k, makes=q.size), tape.op(v, makes=q.size)
    sums = work.tokens * work.heads.num_queries * work.wide
    operands = [q, keys, values]
    out = tape.op(
        *operands, makes=q.size, saves=[*operands, sums], saves_output=True, is_product=True
    )
    return out, (k, v)


def log_sigmoid(tape: Tape, x: Value, work: Workload) -> Value:
    """torch's own."""
    # Its CPU kernel keeps a buffer as large as its input.
    buffer = [x.size] if work.kernels[0] == "chunked" else []
    return tape.op(x, makes=x.size, saves=[x, *buffer])


def narrowed(tape: Tape, x: Value, work: Workload) -> Value:
    """A wide value in the compute dtype."""
    return tape.op(x, makes=x.size // work.wide * work.narrow) if work.is_narrow else x


def _rotated(tape: Tape, x: Value, work: Workload) -> Value:
    """`models.rotary.rotate`: its tables belong to the model."""
    scratch = x.size // work.narrow * work.wide if work.is_narrow else 0
    return tape.op(x, makes=x.size, scratch=scratch, backward_scratch=scratch)


def _other_queries(tape: Tape, rotated: Value, plain: Value, work: Workload) -> dict[str, Value]:
    """Queries that score sinks: beside those of tokens in one tensor, or as another operand."""
    if work.kernels[1] == "flash_attn":
        return {"sink_q": plain}
    return {"q": tape.op(rotated, plain, makes=rotated.size + plain.size)}


def _linear_operands(
    tape: Tape, heads: Heads, gate: Value | None, work: Workload
) -> dict[str, Value]:
    """What `models.linear_attention.GatedLinearAttention` gives its kernel."""
    q, k, v = heads
    q = tape.op(q, makes=q.size, saves_output=True)
    if gate is None:
        k, decay = _key_tied_gate(tape, k, work)
    else:
        k = tape.op(k, makes=k.size, saves_output=True)
        decay = _low_rank_decay(tape, gate, work)
    return {"q": q, "k": k, "v": v, "log_decay": decay}


def _linear_sinks(
    tape: Tape, operands: dict[str, Value], work: Workload
) -> tuple[Value, tuple[Value]]:
    """Outputs of sinks and the state that they leave: of one kernel, which any gradient runs."""
    heads = work.heads
    memory = linear_memory(work.kernels[0], heads)
    size = heads.num_keys * heads.dim**2 * work.wide
    state = _kernel(tape, operands, memory, work, makes=size)
    return tape.op(state, makes=operands["q"].size, is_product=True), (state,)


def _low_rank_decay(tape: Tape, gate: Value, work: Workload) -> Value:
    keys = work.heads.num_keys * work.heads.dim
    size = work.tokens * keys * work.wide
    weights = (work.model.linear.gate_low_rank_dim + 1) * keys * work.wide
    logits = tape.op(gate, makes=size, saves=[gate], weights=weights, of="gate_up", is_product=True)
    return tape.op(log_sigmoid(tape, logits, work), makes=size)


def _key_tied_gate(tape: Tape, keys: Value, work: Workload) -> tuple[Value, Value]:
    """`models.linear_attention.key_tied_gate`."""
    linear = work.model.linear
    u = widened(tape, keys, work)
    if linear.gate_offset:
        u = tape.op(u, makes=u.size, hands_gradient_on=True)
    decay = log_sigmoid(tape, tape.op(u, makes=u.size), work)
    key = tape.op(u, makes=u.size, saves_output=True)
    if linear.gate_floor:
        key = tape.op(key, makes=u.size)
        shifted = tape.op(decay, makes=u.size, hands_gradient_on=True)
        decay = tape.op(shifted, makes=u.size, saves=[shifted, work.wide])
    return narrowed(tape, key, work), decay


def _kernel(  # noqa: PLR0913 - what a kernel reads and makes
    tape: Tape,
    operands: dict[str, Value],
    memory: KernelMemory,
    work: Workload,
    seen: Sequence[Value] = (),
    *,
    makes: int | None = None,
) -> Value:
    """One call; it keeps what it sees of sinks, which belongs to them."""
    kept = [x for name, x in operands.items() if name in memory.operands or name == "sink_q"]
    return tape.op(
        *operands.values(),
        *seen,
        makes=work.heads.query_elements * work.narrow if makes is None else makes,
        saves=[*kept, *seen, memory.aside],
        saves_output=memory.keeps_output,
        scratch=memory.scratch,
        backward_scratch=memory.backward_scratch,
        is_product=True,
    )
