"""Bytes of activations: what a block of `models` keeps between forward and backward, and needs.

Each function of this and its neighbours writes down the operations of the module that it is named
after, in the order of that module's `forward`: `models.operation_memory` what they share,
`models.mixer_memory` the mixers, `models.head_memory` the ends of a model.
"""

from __future__ import annotations

from models.layer_pattern import Mixers
from models.memory_tape import Footprint, Tape, Value
from models.mixer_memory import mixer
from models.operation_memory import Again, Workload, column, neuron, norm_and_enter, row


def block_footprint(work: Workload, mixers: Mixers, again: Again | None = None) -> Footprint:
    """Of one block, from the residual stream to the residual stream."""
    again = Again() if again is None else again
    tape = Tape(work.stream)
    x = tape.source
    if mixers:
        mixed = mixer(tape, x, mixers, work, again)
        x = tape.op(x, mixed, makes=work.stream, hands_gradient_on=True)
    out = _swiglu(tape, x, work, again)
    result = tape.op(x, out, makes=work.stream, hands_gradient_on=True)
    return tape.footprint(result, recompute=again.block)


def _swiglu(tape: Tape, x: Value, work: Workload, again: Again) -> Value:
    """The block's second norm and `models.feed_forward.SwiGLU`."""
    bias, width = work.model.ffn_bias, work.model.intermediate_size // work.tp
    inner = work.tokens * width * work.narrow
    normed, x = norm_and_enter(tape, x, work, again)
    gate = column(tape, x, width, work, bias=bias)
    up = column(tape, x, width, work, bias=bias)
    with tape.computed_again(again.activations):
        activated = tape.op(gate, makes=inner, saves=[gate])
        product = tape.op(activated, up, makes=inner, saves=[activated, up])
        encoded = neuron(tape, product, work.tokens, work)
    return row(tape, encoded, width, work, bias=bias, holds=[normed, product])
