"""Bytes of the operations that modules of `models` share: norms, neurons, linears, regions.

Each function here writes down the operations of the module or method that it is named after on a
tape, for one microbatch on one rank. Tensor parallelism cuts heads, FFN channels and the
vocabulary; with sequence parallelism the residual stream is cut along tokens too.

Shape letters: T tokens of the microbatch, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from models.config import ModelConfig, NeuronKind, SpikingConfig, ThresholdGrad
from models.kernel_memory import Heads
from models.memory_tape import Tape, Value
from models.mixer_config import SinkConfig

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
    ep: int = 1

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

    def of_sinks(self) -> Workload:
        """The stream of sinks as a microbatch of its own, of which nothing is dropped or learned.

        Its sinks are tokens: the model has none beside them.
        """
        count = self.model.sinks.num_tokens
        unlimited = replace(
            self.model.moe, capacity_factor=None, balance_coefficient=0.0, z_loss_coefficient=0.0
        )
        model = replace(self.model, sinks=SinkConfig(), moe=unlimited)
        return replace(self, model=model, rows=1, length=count)

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
    """What one block computes again in the backward pass; see `models.recomputation`.

    Without `block_norms` only what follows the norms of the block, of what `norms` names.
    """

    block: bool = False
    norms: bool = False
    activations: bool = False
    mixer: bool = False
    experts: bool = False
    expert_layer: bool = False
    block_norms: bool = True

    def of_sinks(self, *, is_read: bool) -> Again:
        """The same of the stream of sinks; nothing asks for parts of what nobody reads."""
        if not is_read or self.expert_layer:
            return Again(block=self.block)
        return replace(self, mixer=False, block_norms=False)


def norm(tape: Tape, x: Value, num_rows: int, work: Workload, of: str) -> Value:
    """`models.norm.RMSNorm` named `of`: keeps x and one number a row."""
    wide = x.size // work.narrow * work.wide
    return tape.op(
        x,
        makes=x.size,
        weights=wide // num_rows,
        of=of,
        saves=[x, num_rows * work.wide],
        scratch=2 * wide if work.is_narrow else 0,
        # grad, x and the result in the wide dtype, and their product.
        backward_scratch=4 * wide if work.is_narrow else wide,
    )


def neuron(tape: Tape, x: Value, num_rows: int, work: Workload) -> Value:
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


def column(  # noqa: PLR0913 - a linear
    tape: Tape, x: Value, width: int, work: Workload, *, bias: bool, of: str
) -> Value:
    """A linear named `of` from D to `width` local channels: keeps x."""
    weights = (work.model.hidden_size * width + (width if bias else 0)) * work.narrow
    makes = work.tokens * width * work.narrow
    return tape.op(x, makes=makes, saves=[x], weights=weights, of=of, is_product=True)


def row(  # noqa: PLR0913 - a module's closing linear
    tape: Tape,
    x: Value,
    width: int,
    work: Workload,
    *,
    bias: bool,
    holds: Sequence[Value],
    of: str,
) -> Value:
    """A linear from `width` local channels to the residual stream: keeps x.

    The module that it closes still `holds` its own input and what its neurons encoded.
    """
    hidden = work.model.hidden_size
    whole = work.tokens * hidden * work.narrow
    weights = (hidden * width + (hidden if bias else 0)) * work.narrow
    out = tape.op(x, makes=whole, saves=[x], holds=holds, weights=weights, of=of, is_product=True)
    reduced = leave(tape, out, work)
    if work.tp == 1 or not bias:
        return reduced
    return tape.op(reduced, makes=work.stream, hands_gradient_on=True)


def leave(tape: Tape, x: Value, work: Workload) -> Value:
    """Out of a tensor-parallel region: sums over ranks, cuts tokens under sequence parallelism."""
    if work.tp == 1:
        return x
    return tape.op(x, makes=work.stream, hands_gradient_on=not work.sequence_parallel)


def enter(tape: Tape, x: Value, work: Workload) -> Value:
    """Into a tensor-parallel region: gathers tokens under sequence parallelism."""
    return tape.op(x, makes=x.size * work.tp) if work.sequence_parallel else x


def widened(tape: Tape, x: Value, work: Workload) -> Value:
    """x in the wide dtype."""
    return tape.op(x, makes=x.size // work.narrow * work.wide) if work.is_narrow else x


def norm_and_enter(
    tape: Tape, x: Value, work: Workload, again: Again, of: str
) -> tuple[Value, Value]:
    """What a block's norm makes of x, and what the projections read."""
    if not again.block_norms:
        normed = norm(tape, x, work.stream_tokens, work, of)
    with tape.computed_again(again.norms):
        if again.block_norms:
            normed = norm(tape, x, work.stream_tokens, work, of)
        return normed, enter(tape, neuron(tape, normed, work.stream_tokens, work), work)
