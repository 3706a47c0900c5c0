"""Learning rates against closed forms written independently."""

from __future__ import annotations

import math

import pytest

from training.config import ScheduleConfig, ScheduleKind
from training.lr_schedule import check_schedule, learning_rate, num_decay_steps


def rates(num_steps: int, schedule: ScheduleConfig, *, upto: int | None = None) -> list[float]:
    return [
        learning_rate(step, peak=2.0, num_steps=num_steps, schedule=schedule)
        for step in range(1, (upto or num_steps) + 1)
    ]


def test_warm_up_is_linear_and_ends_at_the_peak() -> None:
    schedule = ScheduleConfig(kind=ScheduleKind.constant, warmup_steps=4)
    assert rates(8, schedule) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0]


def test_cosine_is_half_a_cosine_from_the_peak_to_the_minimum() -> None:
    schedule = ScheduleConfig(kind=ScheduleKind.cosine, warmup_steps=2, min_lr_factor=0.1)
    found = rates(12, schedule)
    low, high = 0.2, 2.0
    for step in range(3, 13):
        angle = math.pi * (step - 2) / 10
        assert found[step - 1] == pytest.approx(
            (high + low) / 2 + (high - low) / 2 * math.cos(angle)
        )
    assert found[-1] == pytest.approx(low)


def test_cosine_over_fewer_steps_stays_at_the_minimum_afterwards() -> None:
    schedule = ScheduleConfig(kind=ScheduleKind.cosine, decay_steps=4, min_lr_factor=0.25)
    assert rates(8, schedule)[3:] == pytest.approx([0.5] * 5)


def test_warm_up_stable_decay_has_its_three_parts() -> None:
    schedule = ScheduleConfig(
        kind=ScheduleKind.warmup_stable_decay, warmup_steps=2, decay_steps=4, min_lr_factor=0.0
    )
    assert rates(10, schedule) == pytest.approx([1, 2, 2, 2, 2, 2, 1.5, 1.0, 0.5, 0.0])


def test_warm_up_stable_decay_falls_over_the_last_fifth_unless_told_otherwise() -> None:
    schedule = ScheduleConfig(kind=ScheduleKind.warmup_stable_decay)
    assert num_decay_steps(schedule, 50) == 10
    found = rates(50, schedule)
    assert found[39] == 2.0
    assert found[40] < 2.0


@pytest.mark.parametrize("kind", list(ScheduleKind))
def test_steps_beyond_the_stage_keep_the_final_rate(kind: ScheduleKind) -> None:
    schedule = ScheduleConfig(kind=kind, warmup_steps=2)
    found = rates(10, schedule, upto=14)
    assert found[10:] == [found[9]] * 4


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (ScheduleConfig(warmup_steps=-1), r"stages\.a\.schedule\.warmup_steps \(-1\) must be 0"),
        (ScheduleConfig(decay_steps=-2), r"decay_steps \(-2\) must be 0"),
        (ScheduleConfig(min_lr_factor=1.5), r"min_lr_factor \(1\.5\) must be between 0 and 1"),
        (
            ScheduleConfig(kind=ScheduleKind.warmup_stable_decay, warmup_steps=6, decay_steps=5),
            r"warmup_steps \+ decay_steps \(11\) must fit the stage: got steps 10",
        ),
        (ScheduleConfig(warmup_steps=11), r"\(11\) must fit the stage: got steps 10"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused(schedule: ScheduleConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_schedule(schedule, num_steps=10, stage="a")
