"""Bytes of activations: what the modules of `models` keep between forward and backward, and need.

Each function here writes down the operations of the module that it is named after, in the order of
that module's `forward`, for one microbatch on one rank. Tensor parallelism cuts heads, FFN channels
and the vocabulary; with sequence parallelism the residual stream is cut along tokens too.

Shape letters: T tokens of the microbatch, D hidden, N query heads, G key-value heads, H head dim, F
ffn, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from models.config import ModelConfig, NeuronKind, SpikingConfig, ThresholdGrad
from models.kernel_memory import Heads, KernelMemory, linear_memory, softmax_memory
from models.layer_pattern import MixerKind, Mixers
from models.memory_tape import Footprint, Tape, Value

PLAIN_KERNELS = ("chunked", "blocked")
"""Those of a device that has no others: a processor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """One microbatch on one rank: sizes, dtypes (bytes of an element), kernels.

    `narrow` is the compute dtype, `wide` the same in at least float32. `kernels` are the names of
    the linear and the softmax kernel.
    """

    model: ModelConfig
    spiking: SpikingConfig
    rows: int
    length: int
    narrow: int
    wide: int
    kernels: tuple[str, str] = PLAIN_KERNELS
    tp: int = 1
    sequence_parallel: bool = False

    @property
    def tokens(self) -> int:
        """T."""
        return self.rows * self.length

    @property
    def stream_tokens(self) -> int:
        """Tokens of the residual stream that this rank holds."""
        return self.tokens // self.tp if self.sequence_parallel else self.tokens

    @property
    def stream(self) -> int:
        """Bytes of the residual stream on this rank."""
        return self.stream_tokens * self.model.hidden_size * self.narrow

    @property
    def is_narrow(self) -> bool:
        """Whether modules widen their input to compute."""
        return self.narrow < self.wide

    @property
    def heads(self) -> Heads:
        """This rank's attention problem."""
        return Heads(
            self.rows, self.length, self.model.num_attention_heads // self.tp,
            self.model.num_key_value_heads // self.tp, self.model.head_dim, self.narrow, self.wide,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Again:
    """What one block computes again in the backward pass; see `models.recomputation`."""

    block: bool = False
    norms: bool = False
    activations: bool = False
    mixer: bool = False


def block_footprint(work: Workload, mixers: Mixers, again: Again | None = None) -> Footprint:
    """Of one block, from the residual stream to the residual stream."""
    again = Again() if again is None else again
    tape = Tape(work.stream)
    x = tape.source
    if mixers:
        mixed = _mixer(tape, x, mixers[0], work, again)
        x = tape.op(x, mixed, makes=work.stream, hands_gradient_on=True)
    out = _swiglu(tape, x, work, again)
    result = tape.op(x, out, makes=work.stream, hands_gradient_on=True)
    return tape.footprint(result, recompute=again.block)


def norm(tape: Tape, x: Value, num_rows: int, work: Workload) -> Value:
    """`models.norm.RMSNorm`: keeps x and one number a row."""
    wide = x.size // work.narrow * work.wide
    return tape.op(
        x,
        makes=x.size,
        weights=wide // num_rows,
        saves=[x, num_rows * work.wide],
        scratch=2 * wide if work.is_narrow else 0,
        # grad, x and the result in the wide dtype, and their product.
        backward_scratch=4 * wide if work.is_narrow else wide,
    )


def _neuron(tape: Tape, x: Value, num_rows: int, work: Workload) -> Value:
    """`models.spiking.neurons.AdaptiveThreshold`: keeps nothing unless its threshold is trained."""
    if work.spiking.neuron is NeuronKind.off:
        return x
    wide = x.size // work.narrow * work.wide
    scratch = wide if work.is_narrow else 0
    if work.spiking.threshold_grad is ThresholdGrad.detached:
        return tape.op(x, makes=x.size, scratch=scratch, hands_gradient_on=True)
    return tape.op(
        x,
        makes=x.size,
        saves=[x, 2 * num_rows * work.wide],
        scratch=scratch,
        backward_scratch=2 * wide + (x.size if work.is_narrow else 0),
    )


def _column(tape: Tape, x: Value, width: int, work: Workload, *, bias: bool) -> Value:
    """A linear from D to `width` local channels: keeps x."""
    weights = (work.model.hidden_size * width + (width if bias else 0)) * work.narrow
    makes = work.tokens * width * work.narrow
    return tape.op(x, makes=makes, saves=[x], weights=weights, is_product=True)


def _row(  # noqa: PLR0913 - a module's closing linear
    tape: Tape, x: Value, width: int, work: Workload, *, bias: bool, holds: Sequence[Value]
) -> Value:
    """A linear from `width` local channels to the residual stream: keeps x.

    The module that it closes still `holds` its own input and what its neurons encoded.
    """
    hidden = work.model.hidden_size
    whole = work.tokens * hidden * work.narrow
    weights = (hidden * width + (hidden if bias else 0)) * work.narrow
    out = tape.op(x, makes=whole, saves=[x], holds=holds, weights=weights, is_product=True)
    if work.tp == 1:
        return out
    reduced = tape.op(out, makes=work.stream, hands_gradient_on=not work.sequence_parallel)
    return tape.op(reduced, makes=work.stream, hands_gradient_on=True) if bias else reduced


def enter(tape: Tape, x: Value, work: Workload) -> Value:
    """Into a tensor-parallel region: gathers tokens under sequence parallelism."""
    if not work.sequence_parallel:
        return x
    return tape.op(x, makes=work.tokens * work.model.hidden_size * work.narrow)


def _normed(tape: Tape, x: Value, work: Workload, again: Again) -> tuple[Value, Value]:
    """What a block's norm makes of x, and what the projections read."""
    with tape.computed_again(again.norms):
        normed = norm(tape, x, work.stream_tokens, work)
        return normed, enter(tape, _neuron(tape, normed, work.stream_tokens, work), work)


def _swiglu(tape: Tape, x: Value, work: Workload, again: Again) -> Value:
    """The block's second norm and `models.feed_forward.SwiGLU`."""
    bias, width = work.model.ffn_bias, work.model.intermediate_size // work.tp
    inner = work.tokens * width * work.narrow
    normed, x = _normed(tape, x, work, again)
    gate = _column(tape, x, width, work, bias=bias)
    up = _column(tape, x, width, work, bias=bias)
    with tape.computed_again(again.activations):
        activated = tape.op(gate, makes=inner, saves=[gate])
        product = tape.op(activated, up, makes=inner, saves=[activated, up])
        encoded = _neuron(tape, product, work.tokens, work)
    return _row(tape, encoded, width, work, bias=bias, holds=[normed, product])


def _mixer(  # noqa: PLR0913 - a module and how it runs
    tape: Tape, x: Value, kind: MixerKind, work: Workload, again: Again
) -> Value:
    """The block's first norm, then `models.projections.HeadProjections` around a mixer."""
    model, heads = work.model, work.heads
    queries, keys = heads.num_queries * heads.dim, heads.num_keys * heads.dim
    is_linear = kind is MixerKind.linear
    normed, x = _normed(tape, x, work, again)
    q = _column(tape, x, queries, work, bias=model.qkv_bias)
    k = _column(tape, x, keys, work, bias=model.qkv_bias)
    v = _column(tape, x, keys, work, bias=model.qkv_bias)
    low_rank = _low_rank_gate(tape, x, work, again) if is_linear else None
    with tape.computed_again(again.mixer):
        if model.qk_norm:
            q = norm(tape, q, work.tokens * heads.num_queries, work)
            k = norm(tape, k, work.tokens * heads.num_keys, work)
        if low_rank is not None:
            out = _linear_attention(tape, (q, k, v), low_rank, work)
        else:
            window = model.visible_window_tokens if kind is MixerKind.sliding_window else None
            memory = softmax_memory(work.kernels[1], heads, window)
            operands = {"q": _rotated(tape, q, work), "k": _rotated(tape, k, work), "v": v}
            out = _kernel(tape, operands, memory, work)
    with tape.computed_again(again.mixer or (is_linear and again.norms)):
        if is_linear:
            out = norm(tape, out, work.tokens * heads.num_queries, work)
        encoded = _neuron(tape, out, work.tokens, work)
    return _row(tape, encoded, queries, work, bias=model.output_bias, holds=[normed, out])


def _rotated(tape: Tape, x: Value, work: Workload) -> Value:
    """`models.rotary.rotate`: its tables belong to the model."""
    scratch = x.size // work.narrow * work.wide if work.is_narrow else 0
    return tape.op(x, makes=x.size, scratch=scratch, backward_scratch=scratch)


def _low_rank_gate(tape: Tape, x: Value, work: Workload, again: Again) -> Value:
    """The first half of the gate of `L`, in the wide dtype."""
    rank = work.model.linear.gate_low_rank_dim
    with tape.computed_again(again.norms):
        if work.is_narrow:
            x = tape.op(x, makes=x.size // work.narrow * work.wide)
    weights = rank * work.model.hidden_size * work.wide
    makes = work.tokens * rank * work.wide
    return tape.op(x, makes=makes, saves=[x], weights=weights, is_product=True)


def _linear_attention(
    tape: Tape, heads: tuple[Value, Value, Value], low_rank: Value, work: Workload
) -> Value:
    """`models.linear_attention.GatedLinearAttention` from its projections to its kernel."""
    q, k, v = heads
    q, k = (tape.op(value, makes=value.size, saves_output=True) for value in (q, k))
    keys = work.heads.num_keys * work.heads.dim
    size = work.tokens * keys * work.wide
    weights = (work.model.linear.gate_low_rank_dim + 1) * keys * work.wide
    logits = tape.op(low_rank, makes=size, saves=[low_rank], weights=weights, is_product=True)
    # torch's CPU kernel of logsigmoid keeps a buffer as large as its input.
    buffer = [size] if work.kernels[0] == "chunked" else []
    log_gate = tape.op(logits, makes=size, saves=[logits, *buffer])
    decay = tape.op(log_gate, makes=size)
    memory = linear_memory(work.kernels[0], work.heads)
    return _kernel(tape, {"q": q, "k": k, "v": v, "log_decay": decay}, memory, work)


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
