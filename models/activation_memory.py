"""Bytes of activations: what a block of `models` keeps between forward and backward, and needs.

Each function of this and its neighbours writes down the operations of the module that it is named
after, in the order of that module's `forward`: `models.operation_memory` what they share,
`models.mixer_memory` the mixers, `models.feed_forward_memory` what follows them,
`models.head_memory` the ends of a model.
"""

from __future__ import annotations

from models.feed_forward_memory import expert_layer, swiglu
from models.layer_pattern import FfnKind, Mixers
from models.memory_tape import Footprint, Tape
from models.mixer_memory import mixer
from models.operation_memory import Again, Workload


def block_footprint(
    work: Workload, mixers: Mixers, ffn: FfnKind, again: Again | None = None
) -> Footprint:
    """Of one block, from the residual stream to the residual stream."""
    again = Again() if again is None else again
    tape = Tape(work.stream)
    x = tape.source
    if mixers:
        mixed = mixer(tape, x, mixers, work, again)
        x = tape.op(x, mixed, makes=work.stream, hands_gradient_on=True)
    if ffn is FfnKind.mixture_of_experts:
        outs = expert_layer(tape, x, work, again)
    else:
        outs = [swiglu(tape, x, work, again)]
    result = tape.op(x, *outs, makes=work.stream, hands_gradient_on=True)
    return tape.footprint(result, recompute=again.block)
