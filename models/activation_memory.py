"""Bytes of activations: what a block of `models` keeps between forward and backward, and needs.

Each function of this and its neighbours writes down the operations of the module that it is named
after, in the order of that module's `forward`: `models.operation_memory` what they share,
`models.mixer_memory` the mixers, `models.feed_forward_memory` what follows them,
`models.head_memory` the ends of a model.
"""

from __future__ import annotations

from models.feed_forward_memory import expert_layer, swiglu
from models.layer_pattern import FfnKind, Mixers
from models.memory_tape import Footprint, Tape, Value
from models.mixer_memory import mixer
from models.operation_memory import Again, Workload


def block_footprint(
    work: Workload,
    mixers: Mixers,
    ffn: FfnKind,
    again: Again | None = None,
    *,
    sinks_are_read: bool = True,
) -> Footprint:
    """Of one block, from the residual stream to the residual stream, and that of sinks if any.

    `sinks_are_read`: whether anybody has a gradient for the sinks that leave it. Where nobody has,
    what they keep goes with the forward pass, and does not count.
    """
    again = Again() if again is None else again
    own = work.of_sinks() if work.model.uses_sinks else None
    tape = Tape(work.stream, *(() if own is None else (own.stream,)))
    x, sinks = tape.source, None if own is None else tape.sources[1]
    if mixers:
        mixed, mixed_sinks = mixer(tape, x, mixers, work, again, sinks)
        x = tape.op(x, mixed, makes=work.stream, hands_gradient_on=True)
        if sinks is not None and mixed_sinks is not None:
            sinks = tape.op(sinks, mixed_sinks, makes=sinks.size, hands_gradient_on=True)
    results = [_feed_forward(tape, x, ffn, work, again)]
    if sinks is not None and own is not None and sinks_are_read:
        again_of_sinks = again.of_sinks(is_read=True)
        results.append(_feed_forward(tape, sinks, ffn, own, again_of_sinks))
    return tape.footprint(*results, recompute=again.block)


def _feed_forward(tape: Tape, x: Value, ffn: FfnKind, work: Workload, again: Again) -> Value:
    """A stream with what the layer's second half adds to it."""
    if ffn is FfnKind.mixture_of_experts:
        outs = expert_layer(tape, x, work, again)
    else:
        outs = [swiglu(tape, x, work, again)]
    return tape.op(x, *outs, makes=work.stream, hands_gradient_on=True)
