"""The peak of one rank's memory over a step, by replaying when FSDP2 and the schedule allocate.

`models.activation_memory` says what a module holds, `parallel.unit_sizes` what a unit's parameters
are; here they meet in time: gathered parameters, gradients before and after their reduction,
microbatches in flight, buffers that torch's pipelining and FSDP2 keep. The order is that of torch
2.13; all sizes are bytes. Nothing is allocated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from models.memory_tape import Footprint
from parallel.config import Shard
from parallel.schedule_order import Action, Work
from parallel.unit_replay import Ledger, Rules, UnitReplay
from parallel.unit_sizes import Unit

NORM_BYTES = 8
"""Gradient norms are taken in float64: torch copies a narrower gradient."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageBytes:
    """What one stage of a rank is made of.

    `stream` is what a microbatch brings from another stage or takes to one: the residual stream,
    and that of sinks.
    """

    index: int
    units: Sequence[Unit]
    layers: Sequence[int]
    footprints: Sequence[Footprint]
    embedding: Footprint | None
    head: Footprint | None
    stream: int


def replay(
    stages: Sequence[StageBytes], rules: Rules, order: Sequence[Action], *, resting: int
) -> int:
    """Peak of one rank that works through `order`, from what rests between steps (`resting`)."""
    ledger = Ledger(resting, resting)
    running = {stage.index: _Stage(stage, rules, ledger) for stage in stages}
    last = {action.stage: action for action in order if action.work is not Work.forward}
    for action in order:
        stage = running[action.stage]
        if action.work is Work.forward:
            stage.forward()
        else:
            stage.backward(action.work, is_last=action == last[action.stage])
    if rules.master < NORM_BYTES:
        units = [unit for stage in stages for unit in stage.units]
        largest = max((unit.trained.largest for unit in units), default=0)
        ledger.touch(largest * NORM_BYTES)
    return ledger.peak


class _Stage:
    """One stage in the middle of a step."""

    def __init__(self, stage: StageBytes, rules: Rules, ledger: Ledger) -> None:
        self.stage, self.rules, self.ledger = stage, rules, ledger
        self.units = UnitReplay(rules, ledger)

    def forward(self) -> None:
        """One microbatch: afterwards what its backward needs is live, and the stage's output."""
        stage, ledger = self.stage, self.ledger
        self.units.gather(self._of(None, is_float32=False), in_forward=True)
        if stage.embedding is not None:
            ledger.touch(stage.embedding.forward_peak)
            ledger.add(stage.embedding.makes)
        for layer, footprint in zip(stage.layers, stage.footprints, strict=True):
            self.units.gather(self._of(layer), in_forward=True)
            self._run_forward(footprint)
            if self.rules.shard is Shard.parameters:
                self.units.reshard(self._of(layer, is_float32=False))
        if stage.head is not None:
            self.units.gather(self._of(None), in_forward=True)
            self._run_forward(stage.head)
        self.units.end_forward()

    def backward(self, work: Work, *, is_last: bool) -> None:
        """One microbatch, or the half of it that `work` names; then what the step's end brings."""
        if self.stage.index == 0 and work is not Work.backward:
            # The first stage sends no gradient: torch leaves its whole backward to the second half.
            if work is Work.backward_weight:
                self._chain(keeps=False, is_last=is_last)
        elif work is Work.backward_weight:
            self._weights()
        else:
            self._chain(keeps=work is Work.backward_input, is_last=is_last)
        if work is not Work.backward_input:
            self._end_microbatch(is_last)

    def _chain(self, *, keeps: bool, is_last: bool) -> None:
        """From the loss, or from the gradient that the next stage sent, to the stage's input."""
        stage, ledger = self.stage, self.ledger
        # A received gradient lies in a buffer that rests; one made here is new.
        own = 0
        if stage.head is not None:
            self._run_backward(stage.head, self._of(None), keeps=keeps)
            own = stage.head.takes
            ledger.add(own)
        for layer, footprint in reversed([*zip(stage.layers, stage.footprints, strict=True)]):
            units = self._of(layer)
            self.units.gather(units, in_forward=False)
            self.units.prefetch(self._of(layer - 1))
            self._run_backward(footprint, units, keeps=keeps)
            ledger.add(footprint.takes - own)
            own = footprint.takes
            if not keeps:
                self.units.after_backward(units, is_last=is_last)
        if stage.embedding is not None and not keeps:
            ledger.touch(stage.embedding.backward_peak - stage.embedding.makes)
            self._leave(self._of(None), stage.embedding.weight_gradients)
        is_held = stage.embedding is None and self.rules.keeps_sent
        ledger.add(0 if is_held else -own)

    def _run_forward(self, footprint: Footprint) -> None:
        """The module's input is live already."""
        self.ledger.touch(footprint.forward_peak - footprint.takes)
        self.ledger.add(footprint.kept - footprint.takes + footprint.makes)

    def _run_backward(self, footprint: Footprint, units: Sequence[Unit], *, keeps: bool) -> None:
        """What is kept, and the output's gradient, are live already."""
        adds_aside = self.units.is_fresh or any(self.units.widens(unit) for unit in units)
        peak = footprint.backward_peak if adds_aside else footprint.later_backward_peak
        self.ledger.touch(peak - footprint.kept - footprint.makes)
        if keeps:
            self.ledger.add(footprint.split_gradients)
        else:
            self.ledger.add(-footprint.kept)
            self._leave(units, footprint.weight_gradients)

    def _weights(self) -> None:
        """The second half of a split backward: gradients of weights, then all is let go."""
        stage = self.stage
        if stage.head is not None:
            # One operation makes both gradients of the loss, so it runs in both halves.
            self.ledger.touch(stage.head.backward_peak - stage.head.kept)
        ends = [stage.head] if stage.head is not None else []
        for footprint in [*stage.footprints, *ends]:
            self.ledger.touch(footprint.weight_gradients)
            self.ledger.add(-footprint.kept - footprint.split_gradients)
        for unit in stage.units:
            self.units.leave(unit, unit.trained.whole * self.units.width(unit))

    def _leave(self, units: Sequence[Unit], size: int) -> None:
        """Gradients of a module's weights; the small float32 ones count with the others."""
        for unit in units:
            if not unit.is_float32:
                self.units.leave(unit, size)

    def _end_microbatch(self, is_last: bool) -> None:
        """The root's turn; under a pipeline, after a stage's last backward, every unit's."""
        stage, ledger = self.stage, self.ledger
        # A received input lies in a buffer that rests; an output to send was kept by the runtime.
        ledger.add(0 if stage.embedding is not None else stage.stream)
        ledger.add(0 if stage.head is not None or self.rules.keeps_sent else -stage.stream)
        if self.rules.is_pipelined:
            self.units.after_backward(stage.units, is_last=False)
            if is_last:
                self.units.reshard(stage.units)
                self.units.reduce([*self._of(None), *reversed(stage.units)])
        else:
            self.units.after_backward(self._of(None), is_last=is_last)
        self.units.end_microbatch(is_last=is_last)

    def _of(self, layer: int | None, *, is_float32: bool | None = None) -> list[Unit]:
        """Units of a layer, or of the root."""
        return [
            unit
            for unit in self.stage.units
            if unit.layer == layer and is_float32 in (None, unit.is_float32)
        ]
