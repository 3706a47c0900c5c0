"""When FSDP2 allocates and frees what belongs to its units, as additions to a ledger.

Gathers, prefetches, reshards and reduces as torch 2.13 does, with the buffers that each holds and
for how long. Knows neither activations nor a schedule; all sizes are bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from parallel.config import Shard
from parallel.unit_sizes import Unit


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """How parameters are held: bytes of an element at rest and in compute, and for how long.

    `is_pipelined`: torch's pipelining reduces gradients once, after a stage's last backward, and
    keeps parameters gathered until then. `keeps_sent`: its schedules of several stages a rank wait
    for what they send at the end of the step only, and hold it until then. `copies_scattered`: a
    reduce-scatter sums up in a copy of its input, as gloo does.
    """

    master: int
    narrow: int
    shard: Shard
    is_pipelined: bool
    keeps_sent: bool = False
    copies_scattered: bool = False


@dataclass(slots=True)
class Ledger:
    """A running total and its maximum."""

    live: int = 0
    peak: int = 0

    def add(self, size: int) -> None:
        """Allocate, or free with a negative size."""
        self.live += size
        self.peak = max(self.peak, self.live)

    def touch(self, extra: int) -> None:
        """Allocate and free at once."""
        self.peak = max(self.peak, self.live + extra)


@dataclass(slots=True)
class UnitReplay:
    """The units of one stage in the middle of a step.

    `is_fresh`: no gradient of an earlier microbatch is there to be added to.
    """

    rules: Rules
    ledger: Ledger
    is_fresh: bool = True
    gathered: set[Unit] = field(default_factory=set)
    prefetched: set[Unit] = field(default_factory=set)
    reduced: set[Unit] = field(default_factory=set)
    gradients: Counter[Unit] = field(default_factory=Counter)
    gather_output: int = 0
    reduce_input: int = 0

    def gather(self, units: Sequence[Unit], *, in_forward: bool) -> None:
        """Copy shards, through one flat output, into whole parameters of the compute dtype.

        In forward the flat output stays until the next unit has its own.
        """
        for unit in units:
            if unit in self.gathered:
                continue
            self.gathered.add(unit)
            whole = unit.all.padded * self.width(unit)
            if unit.num_shards > 1:
                self._gather_flat(unit)
                if in_forward:
                    self.ledger.add(-self.gather_output)
                    self.gather_output = whole
                self.ledger.add(whole)
                self.prefetched.discard(unit)
                self.ledger.add(0 if in_forward else -whole)
            else:
                self.ledger.add(whole)

    def prefetch(self, units: Sequence[Unit]) -> None:
        """FSDP2 gathers the unit before while this one runs backward."""
        for unit in units:
            if unit.num_shards > 1 and unit not in self.gathered:
                self._gather_flat(unit)
                self.prefetched.add(unit)

    def end_forward(self) -> None:
        """The last flat output goes with the end of the stage's forward."""
        self.ledger.add(-self.gather_output)
        self.gather_output = 0

    def reshard(self, units: Sequence[Unit]) -> None:
        """Give up whole parameters."""
        for unit in units:
            if unit in self.gathered:
                self.gathered.remove(unit)
                self.ledger.add(-unit.all.padded * self.width(unit))

    def leave(self, unit: Unit, size: int) -> None:
        """Gradients of weights that a first backward leaves, in the compute dtype."""
        # A tied head and embedding have one gradient.
        size = min(size, unit.trained.whole * self.width(unit) - self.gradients[unit])
        if self.is_fresh and size > 0:
            self.ledger.add(size)
            self.gradients[unit] += size

    def after_backward(self, units: Sequence[Unit], *, is_last: bool) -> None:
        """Of the units, for one microbatch: reduce, or add up in the dtype of the reduction."""
        if self.reduces(is_last):
            self.reshard(units)
            self.reduce(units)
            return
        for unit in units:
            if self.is_fresh:
                whole = unit.trained.whole * self.rules.master
                self.ledger.add(whole - self.gradients[unit])
                self.gradients[unit] = whole

    def end_microbatch(self, *, is_last: bool) -> None:
        """The last reduction's buffer goes; the next microbatch adds to what is there."""
        self.is_fresh = self.reduces(is_last)
        self.ledger.add(-self.reduce_input)
        self.reduce_input = 0

    def reduces(self, is_last: bool) -> bool:
        """Whether units reduce their gradients as soon as they have them."""
        if self.rules.is_pipelined:
            return False
        return is_last or self.rules.shard is Shard.parameters

    def reduce(self, units: Sequence[Unit]) -> None:
        """Sum gradients over ranks: a buffer of all of them in, this rank's shards out."""
        ledger = self.ledger
        for unit in units:
            if not self.gradients[unit]:
                continue
            ledger.add(-self.reduce_input)
            self.reduce_input = unit.trained.padded * self.rules.master
            ledger.add(self.reduce_input)
            ledger.add(-self.gradients.pop(unit))
            shard = unit.trained.shard * self.rules.master
            ledger.add(shard)
            if unit.num_shards > 1 and self.rules.copies_scattered:
                ledger.touch(self.reduce_input)
            # FSDP2 divides by its factor in another buffer where a copy has one shard.
            if unit.num_shards == 1 and unit.num_copies > 1:
                ledger.touch(self.reduce_input)
            if unit in self.reduced:
                ledger.add(-shard)
            self.reduced.add(unit)

    def width(self, unit: Unit) -> int:
        """Bytes of an element while computing."""
        return self.rules.master if unit.is_float32 else self.rules.narrow

    def widens(self, unit: Unit) -> bool:
        """Whether gradients are added up in another dtype than they come in."""
        return self.width(unit) < self.rules.master

    def _gather_flat(self, unit: Unit) -> None:
        """The collective itself, from a narrow copy of the shard where dtypes differ."""
        if unit not in self.prefetched:
            narrowed = unit.all.shard * self.width(unit) if self.widens(unit) else 0
            output = unit.all.padded * self.width(unit)
            self.ledger.touch(narrowed + output)
            self.ledger.add(output)
