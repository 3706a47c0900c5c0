"""Bytes of a mixer: the operations of `models.mixer` around its cores, written on a tape.

Shape letters: T tokens of the microbatch, S sinks, D hidden, N query heads, G key-value heads, H
head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from models.config import ModelConfig
from models.core_memory import Heads, Seen, attend, attend_sinks, narrowed
from models.layer_pattern import MixerKind, Mixers
from models.memory_tape import Tape, Value
from models.mixer_config import BranchMerge, BranchNorm, BranchProjections, GateKind
from models.operation_memory import (
    Again,
    Workload,
    column,
    enter,
    neuron,
    norm,
    norm_and_enter,
    row,
    widened,
)


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


def mixer(  # noqa: PLR0913 - two streams and a mixer
    tape: Tape, x: Value, mixers: Mixers, work: Workload, again: Again, sinks: Value | None = None
) -> tuple[Value, Value | None]:
    """The block's first norm, then `models.mixer.Mixer`; sinks that pass by come back as None."""
    with_sinks = mixers_with_sinks(work.model, mixers) if sinks is not None else ()
    normed, entered = norm_and_enter(tape, x, work, again, "mixer_norm")
    heads = _enter_heads(tape, entered, mixers, mixers, work, again)
    own, own_heads = work.of_sinks() if with_sinks else work, []
    if sinks is not None and with_sinks:
        sinks = norm(tape, sinks, own.stream_tokens, own, "mixer_norm")
        sinks = enter(tape, neuron(tape, sinks, own.stream_tokens, own), own)
        own_heads = _enter_heads(tape, sinks, with_sinks, mixers, own, Again())
    mixed_sinks, seen = [], dict[MixerKind, Seen]()
    with tape.computed_again(again.mixer):
        for each in _normed_heads(tape, own_heads, own):
            rope = work.model.sinks.rope
            out, seen[each.kind] = attend_sinks(tape, *each.operands, own, rope)
            mixed_sinks.append(out)
        mixed = [
            attend(tape, *each.operands, work, seen.get(each.kind, ()))
            for each in _normed_heads(tape, heads, work)
        ]
    after = None
    if mixed_sinks:
        after = _finish(tape, mixed_sinks, with_sinks, mixers, own, Again())
    return _finish(tape, mixed, mixers, mixers, work, again, holds=[normed]), after


def mixers_with_sinks(model: ModelConfig, mixers: Mixers) -> Mixers:
    """Those of a layer that sinks run through."""
    through = model.sinks.through_linear
    return tuple(kind for kind in mixers if through or kind is not MixerKind.linear)


@dataclass(frozen=True, slots=True)
class _CoreInput:
    """Heads of one core, and its low-rank gate if it has one."""

    kind: MixerKind
    heads: Heads
    gate: Value | None
    name: str

    @property
    def operands(self) -> tuple[MixerKind, Heads, Value | None]:
        """As cores take them."""
        return self.kind, self.heads, self.gate


def _enter_heads(  # noqa: PLR0913 - a stream and its mixer
    tape: Tape, entered: Value, kinds: Mixers, mixers: Mixers, work: Workload, again: Again
) -> list[_CoreInput]:
    """Projected heads of the cores of `kinds`, where the layer has `mixers`; shared ones once."""
    is_shared = len(mixers) == 1 or _is_shared(work.model)
    owners = [""] if is_shared else [f"{kind.name}." for kind in kinds]
    heads = [_project(tape, entered, work, owner) for owner in owners]
    gates = [_low_rank_gate(tape, entered, work, again) if _has_gate(kind, work) else None
             for kind in kinds]  # fmt: skip
    repeated = len(kinds) // len(heads)
    return [
        _CoreInput(*each)
        for each in zip(kinds, heads * repeated, gates, owners * repeated, strict=True)
    ]


def _normed_heads(tape: Tape, cores: Sequence[_CoreInput], work: Workload) -> list[_CoreInput]:
    """`models.projections.HeadProjections.norm_heads`, once where heads are shared."""
    if not work.model.qk_norm:
        return list(cores)
    known: dict[Heads, Heads] = {}
    for each in cores:
        if each.heads not in known:
            q, k, v = each.heads
            q_rows = work.tokens * work.heads.num_queries
            k_rows = work.tokens * work.heads.num_keys
            q = norm(tape, q, q_rows, work, f"{each.name}q_norm")
            known[each.heads] = q, norm(tape, k, k_rows, work, f"{each.name}k_norm"), v
    return [replace(each, heads=known[each.heads]) for each in cores]


def _finish(  # noqa: PLR0913 - a stream and its mixer
    tape: Tape,
    mixed: Sequence[Value],
    kinds: Mixers,
    mixers: Mixers,
    work: Workload,
    again: Again,
    *,
    holds: Sequence[Value] = (),
) -> Value:
    """From head outputs of the cores of `kinds` to the residual stream."""
    is_parallel = len(mixers) > 1
    is_shared = not is_parallel or _is_shared(work.model)
    meets_before = is_parallel and _meets_before(work.model)
    is_normed = has_head_norm(work.model, mixers)
    with tape.computed_again(again.mixer or (is_normed and again.norms)):
        rows = work.tokens * work.heads.num_queries
        outs = [
            norm(tape, out, rows, work, f"{kind.name}.head_norm")
            if meets_before or kind is MixerKind.linear
            else out
            for kind, out in zip(kinds, mixed, strict=True)
        ]
        if meets_before:
            outs = _meet(tape, outs, work, adds=is_shared)
        encoded = [neuron(tape, out, work.tokens, work) for out in outs]
    width, bias = work.heads.num_queries * work.heads.dim, work.model.output_bias
    owners = [""] * len(encoded) if is_shared else [f"{kind.name}." for kind in kinds]
    projected = [
        row(tape, each, width, work, bias=bias, holds=[*holds, *outs], of=f"{owner}o_proj")
        for owner, each in zip(owners, encoded, strict=True)
    ]
    if is_parallel and not meets_before:
        with tape.computed_again(again.norms):
            projected = [
                norm(tape, each, work.stream_tokens, work, f"{kind.name}.output_norm")
                for kind, each in zip(kinds, projected, strict=True)
            ]
            projected = _meet(tape, projected, work, adds=True)
    return _sum(tape, projected)


def _has_gate(kind: MixerKind, work: Workload) -> bool:
    return kind is MixerKind.linear and work.model.linear.gate is GateKind.low_rank


def _project(tape: Tape, x: Value, work: Workload, owner: str) -> Heads:
    """`models.projections.HeadProjections.heads`."""
    heads, bias = work.heads, work.model.qkv_bias
    keys = heads.num_keys * heads.dim
    q = column(tape, x, heads.num_queries * heads.dim, work, bias=bias, of=f"{owner}q_proj")
    k = column(tape, x, keys, work, bias=bias, of=f"{owner}k_proj")
    return q, k, column(tape, x, keys, work, bias=bias, of=f"{owner}v_proj")


def _low_rank_gate(tape: Tape, x: Value, work: Workload, again: Again) -> Value:
    """The first half of the gate of `L`, in the wide dtype."""
    rank = work.model.linear.gate_low_rank_dim
    with tape.computed_again(again.norms):
        x = widened(tape, x, work)
    weights = rank * work.model.hidden_size * work.wide
    makes = work.tokens * rank * work.wide
    return tape.op(x, makes=makes, saves=[x], weights=weights, of="gate_down", is_product=True)


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
    return [narrowed(tape, x, work) for x in met] if merge is BranchMerge.learned else met


def _sum(tape: Tape, branches: Sequence[Value]) -> Value:
    first, *others = branches
    for other in others:
        first = tape.op(first, other, makes=first.size, hands_gradient_on=True)
    return first
