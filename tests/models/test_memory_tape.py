"""Replays of small computations against sums by hand."""

from __future__ import annotations

from models.memory_tape import Footprint, Tape, Value


def chain(tape: Tape) -> Value:
    """A linear of 10 weight bytes, an activation, a linear back; the source is 4, inner ones 6."""
    hidden = tape.op(tape.source, makes=6, saves=[tape.source], weights=10, is_product=True)
    active = tape.op(hidden, makes=6, saves=[hidden], scratch=2)
    return tape.op(active, makes=4, saves=[active], weights=12, is_product=True)


def test_a_chain() -> None:
    tape = Tape(4)
    found = tape.footprint(chain(tape))
    assert found.kept == 4 + 6 + 6
    # The output joins what is kept.
    assert found.forward_peak == 16 + 4
    # Gradient of the output 4; then of `active` 6 and of the second weight 12.
    assert found.backward_peak == max(
        16 + 4 + 6 + 12,
        # The output's gradient and `active` are gone, the weight's gradient stays.
        4 + 6 + 6 + 12 + 6,
        4 + 6 + 12 + 4 + 10,
    )
    assert found.later_backward_peak == 16 + 4 + 6 + 12
    assert found.weight_gradients == 22
    # What the half without weights hands on: gradients of both linears' outputs.
    assert found.split_gradients == 6 + 4
    # The activation reads 6 and writes 6.
    assert found.traffic == 12


def test_a_module_that_runs_twice_keeps_its_input() -> None:
    tape = Tape(4)
    result = chain(tape)
    plain, again = tape.footprint(result), tape.footprint(result, recompute=True)
    assert again.kept == 4
    # Nothing is saved: the source, and two values at a time.
    assert again.forward_peak == 4 + 6 + 6 + 2
    assert again.backward_peak == plain.backward_peak
    assert plain.forward_peak + 4 <= plain.backward_peak


def test_a_value_is_freed_after_its_last_use_unless_somebody_holds_it() -> None:
    def footprint(*, holds: bool) -> Footprint:
        tape = Tape(1)
        first = tape.op(tape.source, makes=10)
        second = tape.op(first, makes=2)
        return tape.footprint(tape.op(second, makes=10, holds=[first] if holds else []))

    assert footprint(holds=False).forward_peak == 10 + 2
    assert footprint(holds=True).forward_peak == 10 + 2 + 10
    assert footprint(holds=True).kept == 0


def test_gradients_that_meet_are_added_in_place_unless_shared() -> None:
    tape = Tape(8)
    left = tape.op(tape.source, makes=8)
    right = tape.op(tape.source, makes=8)
    summed = tape.footprint(tape.op(left, right, makes=8, hands_gradient_on=True))
    # One gradient of 8 for both sides; the right one's input gradient, then the left one's.
    assert summed.backward_peak == 8 + 8 + 8

    tape = Tape(8)
    inner = tape.op(tape.source, makes=8)
    residual = tape.footprint(tape.op(tape.source, inner, makes=8, hands_gradient_on=True))
    # The source already has the gradient that `inner` still reads: their sum needs a third place.
    assert residual.backward_peak == 8 + 8 + 8


def test_a_region_keeps_what_it_reads_and_is_made_again_once() -> None:
    def footprint(*, again: bool) -> Footprint:
        tape = Tape(4)
        with tape.computed_again(again):
            wide = tape.op(tape.source, makes=20, saves=[tape.source, 3], scratch=5)
            inner = tape.op(wide, makes=6, saves=[wide])
        first = tape.op(inner, makes=6, saves=[inner])
        second = tape.op(inner, makes=6, saves=[inner])
        return tape.footprint(tape.op(first, second, makes=6, hands_gradient_on=True))

    kept, dropped = footprint(again=False), footprint(again=True)
    assert kept.kept == 4 + 20 + 3 + 6
    assert dropped.kept == 4
    # The last reader asks first and brings back all of it; then `inner` and `wide` run backward.
    back = 4 + 20 + 3 + 6
    assert dropped.backward_peak == max(back + 6 + 6, 4 + 20 + 3 + 6 + 20)
    assert kept.backward_peak == dropped.backward_peak


def test_regions_that_read_each_other_are_made_again_in_order() -> None:
    tape = Tape(4)
    with tape.computed_again(True):
        first = tape.op(tape.source, makes=10, saves=[tape.source])
    with tape.computed_again(True):
        second = tape.op(first, makes=12, saves=[first])
    found = tape.footprint(tape.op(second, makes=2, saves=[second]))
    assert found.kept == 4
    # `first` comes back for `second`, which the last operation asks for. Then `second` is gone.
    assert found.backward_peak == max(4 + 10 + 12 + 2 + 12, 4 + 10 + 12 + 10)


def test_a_region_inside_another_belongs_to_it() -> None:
    tape = Tape(4)
    with tape.computed_again(True):
        outer = tape.op(tape.source, makes=10)
        with tape.computed_again(True):
            inner = tape.op(outer, makes=12, saves=[outer])
    assert tape.footprint(tape.op(inner, makes=2, saves=[inner])).kept == 4


def test_what_nobody_keeps_exists_for_a_moment_when_a_region_is_made_again() -> None:
    tape = Tape(4)
    with tape.computed_again(True):
        large = tape.op(tape.source, makes=50, scratch=5)
        small = tape.op(large, makes=6)
    found = tape.footprint(tape.op(small, makes=2, saves=[small]))
    assert found.kept == 4
    # The gradient of the result, the source, all that is made on the way; `large` is gone before
    # anything else exists.
    again = 2 + 4 + max(50 + 5, 50 + 6)
    assert found.backward_peak == max(again, 4 + 6 + 50 + 2)


def test_what_one_region_makes_again_for_another_is_gone_after_that() -> None:
    tape = Tape(4)
    with tape.computed_again(True):
        first = tape.op(tape.source, makes=30)
    with tape.computed_again(True):
        second = tape.op(first, makes=12)
        third = tape.op(second, makes=12, saves=[second])
    result = tape.op(third, makes=2, saves=[third])
    found = tape.footprint(tape.op(result, makes=2, hands_gradient_on=True))
    assert found.kept == 4
    # All of it once; then the gradients of `third`, `second` and `first`, which nobody reads.
    assert found.backward_peak == max(4 + 2 + 30 + 12 + 12, 4 + 2 + 24 + 12, 4 + 12 + 30)


def test_what_is_kept_anyway_is_kept_to_the_end() -> None:
    tape = Tape(4)
    result = chain(tape)
    plain, again = tape.footprint(result), tape.footprint(result, recompute=True)
    tape.keep(7)
    for before, recompute in ((plain, False), (again, True)):
        found = tape.footprint(result, recompute=recompute)
        assert found.kept == before.kept + 7
        assert found.forward_peak == before.forward_peak + 7
        assert found.backward_peak == before.backward_peak + 7
        assert found.later_backward_peak == before.later_backward_peak + 7
