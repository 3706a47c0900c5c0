"""Bytes that autograd holds while a module runs, by replaying its operations without tensors.

A tape is told each operation of a module: how much it makes, what its backward needs, what it needs
on the side. Replaying gives what stays between forward and backward and the peaks of both. The
rules are torch's in eager mode: a tensor is freed after its last use, a saved one after the
operation that saved it has run backward; a second gradient of one tensor is added to the first in
place where nothing else holds it. Knows no module and no rank; all sizes are bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Footprint:
    """What one module holds for one microbatch, its input included and its output not.

    `kept` stays between forward and backward. `forward_peak` counts from nothing but the input,
    and holds the output; `backward_peak` counts what is kept, the output's gradient and the
    gradients of weights, which the first backward leaves behind (`weight_gradients`) and later
    ones (`later_backward_peak`) add to those. `split_gradients` are the gradients that a backward
    which leaves out the weights must hand to the one which adds them. `traffic` is read and written
    in forward by operations that are no products. `takes` and `makes` are its input and its output.
    """

    kept: int
    forward_peak: int
    backward_peak: int
    later_backward_peak: int
    weight_gradients: int
    split_gradients: int = 0
    traffic: int = 0
    takes: int = 0
    makes: int = 0


@dataclass(eq=False, slots=True)
class Value:
    """One tensor; two values never share memory."""

    size: int


@dataclass(frozen=True, slots=True)
class _Operation:
    inputs: tuple[Value, ...]
    held: tuple[Value, ...]
    output: Value
    saved: tuple[Value, ...]
    saved_aside: int
    scratch: int
    backward_scratch: int
    weight_gradients: int
    weight: object
    hands_gradient_on: bool
    is_product: bool
    region: int | None
    has_gradient: bool = True


@dataclass(eq=False, slots=True)
class _Gradient:
    """A gradient buffer; several values may hold the same one."""

    size: int
    holders: int = 1


class Tape:
    """The operations of one module, from `sources` to the results given to `footprint`."""

    def __init__(self, *source_bytes: int) -> None:
        self.sources = tuple(map(Value, source_bytes))
        self._operations: list[_Operation] = []
        self._kept = 0
        self._regions = 0
        self._region: int | None = None

    @property
    def source(self) -> Value:
        """The first one."""
        return self.sources[0]

    @contextmanager
    def computed_again(self, when: bool) -> Iterator[None]:
        """A region whose operations keep nothing but what they read from outside.

        Neither do later readers keep what it made: in backward the first that asks has it made
        again (`models.recompute`).
        """
        before = self._region
        if when and before is None:
            self._region = self._regions
            self._regions += 1
        yield
        self._region = before

    def keep(self, size: int) -> None:
        """Hold bytes from forward to the end of backward, whatever is computed again."""
        self._kept += size

    def op(  # noqa: PLR0913 - what an operation is
        self,
        *inputs: Value,
        makes: int,
        saves: Sequence[Value | int] = (),
        saves_output: bool = False,
        holds: Sequence[Value] = (),
        scratch: int = 0,
        backward_scratch: int = 0,
        weights: int = 0,
        of: str | None = None,
        hands_gradient_on: bool = False,
        is_product: bool = False,
    ) -> Value:
        """Record an operation and return its output.

        Args:
            inputs: what it reads; all of them get gradients.
            makes: size of the output.
            saves: values that its backward needs, and sizes of what else it saves.
            saves_output: whether its backward needs the output.
            holds: values that a caller of this operation still refers to.
            scratch: what exists beside the output at some moment of the forward.
            backward_scratch: the same beside the gradients of inputs and weights.
            weights: size of the gradients of its weights.
            of: name of the weights, where other operations have gradients for the same.
            hands_gradient_on: its backward returns the output's gradient itself.
            is_product: it multiplies matrices; its time is counted in FLOPs, not in bytes.
        """
        output = Value(makes)
        saved = [value for value in saves if isinstance(value, Value)]
        self._operations.append(
            _Operation(
                inputs, tuple(holds), output, tuple([*saved, output] if saves_output else saved),
                sum(value for value in saves if isinstance(value, int)),
                scratch, backward_scratch, weights, object() if of is None else of,
                hands_gradient_on, is_product, self._region,
            )
        )  # fmt: skip
        return output

    def footprint(self, *results: Value, recompute: bool = False) -> Footprint:
        """What the module holds; with `recompute` it keeps its input and runs forward twice.

        Operations that lead to none of the results count for nothing, but for what a region reads:
        it runs again as a whole.
        """
        operations = self._leading_to(results)
        replay = _Replay(operations, self.sources, results)
        takes, makes = (sum(value.size for value in values) for values in (self.sources, results))
        forward_peak, live = replay.forward(saving=True)
        kept = live - makes
        first, later = (replay.backward(kept, is_first) for is_first in (True, False))
        if recompute:
            again = forward_peak + makes
            first, later = max(first, again), max(later, again)
            forward_peak, _ = replay.forward(saving=False)
            kept = takes
        weighted = [each for each in operations if each.has_gradient and each.weight_gradients]
        weights = {each.weight: each.weight_gradients for each in weighted}
        split = sum(each.output.size for each in weighted)
        traffic = sum(
            each.output.size + sum(value.size for value in each.inputs)
            for each in operations
            if not each.is_product
        )
        kept, forward_peak, first, later = (
            size + self._kept for size in (kept, forward_peak, first, later)
        )
        own = sum(weights.values())
        return Footprint(kept, forward_peak, first, later, own, split, traffic, takes, makes)

    def _leading_to(self, results: Sequence[Value]) -> list[_Operation]:
        """In order, those without a gradient marked."""
        needed = set(results)
        for each in reversed(self._operations):
            needed.update(each.inputs if each.output in needed else ())
        regions = {each.region for each in self._operations if each.output in needed} - {None}
        needed_forward, found = set(needed), list[_Operation]()
        for each in reversed(self._operations):
            if each.output in needed_forward or each.region in regions:
                needed_forward.update(each.inputs)
                found.append(replace(each, has_gradient=each.output in needed))
        return found[::-1]


class _Replay:
    """Walks the operations of a finished tape."""

    def __init__(
        self, operations: Sequence[_Operation], sources: Sequence[Value], results: Sequence[Value]
    ) -> None:
        self.operations, self.sources, self.results = operations, sources, results
        self.region_of = {each.output: each.region for each in operations}
        self.savers = self._count_savers()

    def _count_savers(self) -> Counter[Value]:
        """How many operations need each value in backward; a region needs what it reads."""
        savers = Counter(
            value for each in self.operations if each.has_gradient for value in each.saved
        )
        for values in self._arguments().values():
            savers.update(values)
        return savers

    def _arguments(self) -> dict[int, set[Value]]:
        """What each region reads from outside."""
        found: dict[int, set[Value]] = {}
        for each in self.operations:
            if each.region is not None:
                values = {v for v in each.inputs if self.region_of.get(v) != each.region}
                found.setdefault(each.region, set()).update(values)
        return found

    def forward(self, *, saving: bool) -> tuple[int, int]:
        """Peak, and what is live at the end."""
        kept = {v for v in self.savers if self.region_of.get(v) is None} if saving else set()
        if not saving:
            kept.update(self.sources)
        last_use = {
            v: i for i, each in enumerate(self.operations) for v in (*each.inputs, *each.held)
        }
        live = peak = sum(value.size for value in self.sources)
        for index, each in enumerate(self.operations):
            live += each.output.size
            keeps = saving and each.region is None and each.has_gradient
            live += each.saved_aside if keeps else 0
            peak = max(peak, live + each.scratch)
            for value in {*each.inputs, *each.held, each.output}:
                is_done = last_use.get(value, -1) <= index and value not in self.results
                if is_done and value not in kept:
                    live -= value.size
        return peak, live

    def backward(self, kept: int, is_first: bool) -> int:
        """Peak from the gradients of the results to those of the sources."""
        live = peak = kept + sum(value.size for value in self.results)
        savers, regions = self.savers.copy(), set[int]()
        gradients = {value: _Gradient(value.size) for value in self.results}
        operations = [each for each in reversed(self.operations) if each.has_gradient]
        weights = _WeightGradients(Counter(each.weight for each in operations), is_first)
        first_of = {each.region: each for each in operations}
        arguments = self._arguments()
        for each in operations:
            needed = {each.region, *(self.region_of.get(value) for value in each.saved)}
            for region in sorted(r for r in needed if r is not None):
                made, scratch = self._again(region, regions, savers)
                live += made
                peak = max(peak, live + scratch)
            gradient = gradients.pop(each.output)
            made = 0 if each.hands_gradient_on else sum(value.size for value in each.inputs)
            peak = max(peak, live + made + each.weight_gradients + each.backward_scratch)
            live += made + weights.add(each.weight, each.weight_gradients)
            for value in each.inputs:
                if each.hands_gradient_on:
                    gradient.holders += 1
                    new = gradient
                else:
                    new = _Gradient(value.size)
                extra, change = _accumulate(gradients, value, new)
                peak = max(peak, live + extra)
                live += change
            live -= _release(gradient) + each.saved_aside
            finished = each.saved
            if each.region is not None and first_of[each.region] is each:
                outside = [v for v in arguments[each.region] if self.region_of.get(v) is None]
                finished = (*finished, *outside)
            for value in finished:
                savers[value] -= 1
                live -= 0 if savers[value] else value.size
        return peak

    def _again(self, region: int, regions: set[int], savers: Counter[Value]) -> tuple[int, int]:
        """Make a region's values again, once: bytes that stay, and more for a moment."""
        if region in regions:
            return 0, 0
        regions.add(region)
        before = freed = 0
        for value in self._arguments()[region]:
            inner = self.region_of.get(value)
            if inner is not None:
                before += self._again(inner, regions, savers)[0]
                # What another region made again is not kept for this one.
                savers[value] -= 1
                freed += 0 if savers[value] else value.size
        made, peak = self._made_again(region, savers)
        return before + made - freed, peak - made + freed

    def _made_again(self, region: int, savers: Counter[Value]) -> tuple[int, int]:
        """Bytes that a region's second run leaves, and its peak; what it returns lives as long."""
        inside = [each for each in self.operations if each.region == region]
        returned = {v for each in self.operations if each.region != region for v in each.inputs}
        last_use = {v: i for i, each in enumerate(inside) for v in (*each.inputs, *each.held)}
        live = peak = made = 0
        for index, each in enumerate(inside):
            live += each.output.size + each.saved_aside
            made += each.saved_aside + (each.output.size if savers[each.output] else 0)
            peak = max(peak, live + each.scratch)
            for value in {*each.inputs, *each.held, each.output} - returned:
                is_done = self.region_of.get(value) == region and last_use.get(value, -1) <= index
                live -= value.size if is_done and not savers[value] else 0
        return made, peak


class _WeightGradients:
    """Those of one weight's uses wait for one another before they are a gradient, or join it."""

    def __init__(self, uses: Counter[object], is_first: bool) -> None:
        self.uses, self.is_first = uses, is_first
        self.waiting: set[object] = set()

    def add(self, weight: object, size: int) -> int:
        """After a use's gradient was made: bytes that stay, or are freed."""
        self.uses[weight] -= 1
        waits, is_last = weight in self.waiting, not self.uses[weight]
        self.waiting.add(weight)
        if is_last and not self.is_first:
            return -size if waits else 0
        return 0 if waits else size


def _accumulate(gradients: dict[Value, _Gradient], value: Value, new: _Gradient) -> tuple[int, int]:
    """Add to a value's gradient: bytes needed for a moment, and bytes more or less afterwards."""
    old = gradients.get(value)
    if old is None:
        gradients[value] = new
        return 0, 0
    if old.holders == 1:
        return 0, -_release(new)
    gradients[value] = _Gradient(value.size)
    return value.size, value.size - _release(old) - _release(new)


def _release(gradient: _Gradient) -> int:
    """Drop one holder; bytes that this frees."""
    gradient.holders -= 1
    return 0 if gradient.holders else gradient.size
