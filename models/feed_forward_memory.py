"""Bytes of feed-forward layers: the operations of `models.feed_forward` and of expert layers.

Of expert layers those of `models.mixture_of_experts`, `models.dispatch` and `models.experts`, and
of the way to experts on other ranks and back (`parallel.row_routes`), as in training. Without a
capacity every rank's experts are taken to get as many rows as it has itself: an even load.

Shape letters: T tokens of the microbatch, D hidden, E experts, K choices of a token, M rows of
experts, F inner channels.
"""

from __future__ import annotations

from dataclasses import dataclass

from models.config import ModelConfig, NeuronKind
from models.dispatch import num_expert_rows
from models.expert_config import Balance, ExpertConfig, RouterScore
from models.memory_tape import Tape, Value
from models.operation_memory import (
    Again,
    Workload,
    column,
    enter,
    leave,
    neuron,
    norm,
    norm_and_enter,
    row,
    widened,
)

INDEX = 8
"""Bytes of a place in a list."""


def swiglu(tape: Tape, x: Value, work: Workload, again: Again) -> Value:
    """The block's second norm and `models.feed_forward.SwiGLU`."""
    bias, width = work.model.ffn_bias, work.model.intermediate_size // work.tp
    normed, x = norm_and_enter(tape, x, work, again, "ffn_norm")
    gate = column(tape, x, width, work, bias=bias, of="gate_proj")
    up = column(tape, x, width, work, bias=bias, of="up_proj")
    product, encoded = _activated(tape, gate, up, work.tokens, work, again)
    holds = [normed, product]
    return row(tape, encoded, width, work, bias=bias, holds=holds, of="down_proj")


def _activated(  # noqa: PLR0913 - what lies between three products
    tape: Tape, gate: Value, up: Value, num_rows: int, work: Workload, again: Again
) -> tuple[Value, Value]:
    """What the down projection's neuron reads, and what it makes of it."""
    with tape.computed_again(again.activations):
        activated = tape.op(gate, makes=gate.size, saves=[gate])
        product = tape.op(activated, up, makes=gate.size, saves=[activated, up])
        return product, neuron(tape, product, num_rows, work)


def expert_layer(tape: Tape, x: Value, work: Workload, again: Again) -> list[Value]:
    """The block's second norm and `models.mixture_of_experts.MixtureOfExperts`.

    Returns its output and whatever else has a gradient at the end: the router's losses.
    """
    with tape.computed_again(again.norms and again.block_norms):
        normed = norm(tape, x, work.stream_tokens, work, "ffn_norm")
    layer = _ExpertLayer(tape, work, again)
    tape.keep(layer.plan_bytes())
    with tape.computed_again(again.expert_layer):
        return layer.run(normed)


@dataclass(frozen=True, slots=True)
class _ExpertLayer:
    """One layer's operations, in the order of its forward pass."""

    tape: Tape
    work: Workload
    again: Again

    @property
    def model(self) -> ModelConfig:
        """Sizes."""
        return self.work.model

    @property
    def moe(self) -> ExpertConfig:
        """How tokens choose."""
        return self.work.model.moe

    @property
    def rows(self) -> int:
        """M."""
        return num_expert_rows(self.moe, self.work.rows, self.work.length)

    @property
    def row_bytes(self) -> int:
        """Of all rows of D values."""
        return self.rows * self.model.hidden_size * self.work.narrow

    @property
    def choices(self) -> int:
        """T K."""
        return self.work.tokens * self.moe.top_k

    @property
    def is_spiking(self) -> bool:
        """Whether rows are multiples of a scale."""
        return self.work.spiking.neuron is not NeuronKind.off

    def plan_bytes(self) -> int:
        """Who goes where: `models.dispatch.Dispatch` and `parallel.row_routes.Route`."""
        work, moe = self.work, self.moe
        size = INDEX * (self.choices + self.rows + (work.rows + 1) * moe.num_experts)
        if moe.capacity_factor is not None:
            size += self.choices + self.rows
        if work.ep > 1:
            size += INDEX * (2 * self.rows + moe.num_experts // work.ep)
            size += self.rows * work.wide if self.is_spiking else 0
        return size

    def run(self, normed: Value) -> list[Value]:
        """From the normed residual stream to the layer's output and losses."""
        tape, work = self.tape, self.work
        logits, scores, weights = self._choose(normed)
        weights = enter(tape, weights, work)
        with tape.computed_again(self.again.norms):
            entered = neuron(tape, normed, work.stream_tokens, work)
            entered = enter(tape, entered, work)
        shared = self._shared(entered) if self.moe.num_shared_experts else None
        routed = self._visit(entered)
        combined = self._combine(routed, weights, holds=[normed, entered, logits, scores, weights])
        out = leave(tape, combined, work)
        if shared is not None:
            out = tape.op(out, shared, makes=work.stream, hands_gradient_on=True)
        return [out, *self._losses(logits, scores)]

    def _choose(self, x: Value) -> tuple[Value, Value, Value]:
        """`models.router.Router`: logits, scores and weights of the tokens held here."""
        tape, work, moe = self.tape, self.work, self.moe
        tokens, num_experts = work.stream_tokens, moe.num_experts
        size = tokens * num_experts * work.wide
        with tape.computed_again(self.again.activations):
            x = widened(tape, x, work)
            matrix = num_experts * self.model.hidden_size * work.wide
            logits = tape.op(x, makes=size, saves=[x], weights=matrix, of="router", is_product=True)
        # The order of equals, and whose turn it is.
        scratch = tokens * num_experts * (3 * INDEX + 1)
        scores = tape.op(logits, makes=size, saves_output=True, scratch=scratch)
        chosen, each = tokens * moe.top_k, tokens * work.wide
        weights = tape.op(scores, makes=chosen * work.wide, saves=[chosen * INDEX])
        if moe.renormalise:
            weights = self._normalised(weights, each)
        return logits, scores, weights

    def _normalised(self, x: Value, each: int) -> Value:
        """Divided by sums of `each` bytes, which are kept from 0."""
        total = self.tape.op(x, makes=each)
        limited = self.tape.op(total, makes=each, saves=[total])
        return self.tape.op(x, limited, makes=x.size, saves=[x, limited])

    def _shared(self, entered: Value) -> Value:
        tape, work = self.tape, self.work
        width = self.moe.num_shared_experts * self.model.expert_intermediate_size // work.tp
        with tape.computed_again(self.again.experts):
            gate = column(tape, entered, width, work, bias=False, of="shared.gate_proj")
            up = column(tape, entered, width, work, bias=False, of="shared.up_proj")
            product, encoded = _activated(tape, gate, up, work.tokens, work, self.again)
        holds = [entered, product]
        return row(tape, encoded, width, work, bias=False, holds=holds, of="shared.down_proj")

    def _visit(self, entered: Value) -> Value:
        """What the experts make of their rows, back where those are from."""
        tape, again = self.tape, self.again
        picked = self.choices * self.model.hidden_size * self.work.narrow
        is_cut = self.moe.capacity_factor is not None
        with tape.computed_again(again.experts):
            with tape.computed_again(again.norms):
                rows = tape.op(
                    entered, makes=self.row_bytes, backward_scratch=(1 + is_cut) * picked
                )
            if self.work.ep == 1:
                return self._experts(rows, rows)
            out = self._experts(self._sent(rows), rows)
            scratch = self.row_bytes
            return tape.op(
                out, makes=self.row_bytes, scratch=scratch, backward_scratch=scratch, holds=[rows]
            )

    def _sent(self, rows: Value) -> Value:
        """Rows to the ranks of their experts, as spikes where there are any."""
        size, work = self.row_bytes, self.work
        scratch = size
        if self.is_spiking:
            elements = size // work.narrow
            # Counts, their products with the scale, how far those are the rows.
            scratch = elements * (2 * work.wide + 2) + (size if work.is_narrow else 0) - size
        return self.tape.op(rows, makes=size, scratch=scratch, backward_scratch=size)

    def _experts(self, rows: Value, own: Value) -> Value:
        """`models.experts.Experts`, whose caller holds its `own` rows."""
        tape, work = self.tape, self.work
        inner = self.model.expert_intermediate_size // work.tp
        num_experts = self.moe.num_experts // work.ep
        matrix = num_experts * inner * self.model.hidden_size * work.narrow
        size = self.rows * inner * work.narrow
        gate, up = (
            tape.op(rows, makes=size, saves=[rows], weights=matrix, of=of, is_product=True)
            for of in ("experts.gate_proj", "experts.up_proj")
        )
        product, encoded = _activated(tape, gate, up, self.rows, work, self.again)
        return tape.op(
            encoded, makes=self.row_bytes, saves=[encoded], weights=matrix,
            of="experts.down_proj", holds=[own, gate, up, product], is_product=True,
        )  # fmt: skip

    def _combine(self, routed: Value, weights: Value, holds: list[Value]) -> Value:
        """Weighted sums over each token's rows."""
        work, is_cut = self.work, self.moe.capacity_factor is not None
        if is_cut:
            weights = self.tape.op(weights, makes=weights.size)
        whole = work.tokens * self.model.hidden_size
        picked, wide = whole * self.moe.top_k, self.rows * self.model.hidden_size * work.wide
        made = whole * work.narrow
        forward = picked * work.wide + max(
            picked * work.narrow, whole * (work.wide + work.narrow) if work.is_narrow else made
        )
        # The rows' gradient, and in the wide dtype what it is made of.
        backward = self.row_bytes + (wide if work.is_narrow else 0)
        return self.tape.op(
            routed, weights, makes=made, saves=[routed, weights], holds=holds,
            scratch=forward - made, backward_scratch=backward,
        )  # fmt: skip

    def _losses(self, logits: Value, scores: Value) -> list[Value]:
        """`models.balance.router_losses`, up to numbers too small to count."""
        tape, work, moe = self.tape, self.work, self.moe
        each, losses = work.stream_tokens * work.wide, []
        if moe.balance_coefficient > 0 and moe.balance not in (Balance.none, Balance.bias):
            # A load that the step before left is the model's own.
            units = {Balance.previous_step: 0, Balance.microbatch: 1}.get(moe.balance, work.rows)
            is_even = moe.score is RouterScore.softmax
            shares = scores if is_even else self._normalised(scores, each)
            sums = tape.op(shares, makes=work.rows * moe.num_experts * work.wide)
            fractions = units * moe.num_experts * work.wide
            losses.append(tape.op(sums, makes=0, saves=[fractions]))
        if moe.z_loss_coefficient > 0:
            # Whoever computes logits again keeps these.
            normaliser = tape.op(logits, makes=each, saves=[logits.size], saves_output=True)
            losses.append(tape.op(normaliser, makes=0, saves=[normaliser]))
        return losses
