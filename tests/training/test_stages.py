"""The curriculum: which step belongs where, cut and extended, and refused batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.training.tiny_run import tiny_run
from training.config import ScheduleKind
from training.stages import StagePlan, build_plan, check_rows

PREPARED = Path("prepared")


def plan(**changes: Any) -> StagePlan:
    return build_plan(tiny_run(PREPARED, Path("run"), **changes))


def spans(found: StagePlan) -> list[tuple[str, int, int]]:
    return [(stage.name, stage.first_step, stage.end_step) for stage in found.stages]


def test_stages_follow_each_other_without_gaps() -> None:
    found = plan()
    assert spans(found) == [("short", 0, 3), ("long", 3, 6)]
    assert [found.stage_of(step).name for step in range(8)] == ["short"] * 3 + ["long"] * 5
    assert found.total_steps == 6


@pytest.mark.parametrize(
    ("max_steps", "expected"),
    [
        (2, [("short", 0, 2)]),
        (3, [("short", 0, 3)]),
        (4, [("short", 0, 3), ("long", 3, 4)]),
        (9, [("short", 0, 3), ("long", 3, 9)]),
    ],
)
def test_max_steps_cuts_or_extends(max_steps: int, expected: list[tuple[str, int, int]]) -> None:
    assert spans(plan(training={"max_steps": max_steps})) == expected


def test_cutting_a_run_changes_no_learning_rate() -> None:
    whole, cut = plan(), plan(training={"max_steps": 5})
    for step in range(5):
        rate = whole.stage_of(step).learning_rate(step)
        assert cut.stage_of(step).learning_rate(step) == rate


def test_the_schedule_starts_again_with_each_stage() -> None:
    found = plan()
    rates = [found.stage_of(step).learning_rate(step) for step in range(6)]
    assert rates == pytest.approx([1e-2, 5.5e-3, 1e-3, 5e-3, 2.75e-3, 5e-4])


def test_a_stage_uses_its_own_schedule_and_data_or_the_runs() -> None:
    stages = {
        "a": {"sequence_length": 16, "steps": 4, "global_batch_tokens": 64, "lr": 1.0},
        "b": {
            "sequence_length": 16, "steps": 4, "global_batch_tokens": 64, "lr": 2.0,
            "schedule": {"kind": "constant"}, "data": {"path": "other"},
        },
    }  # fmt: skip
    first, second = plan(stages=stages).stages
    assert (first.data.path, second.data.path) == ("prepared", "other")
    assert (first.schedule.warmup_steps, second.schedule.kind) == (1, ScheduleKind.constant)
    assert first.learning_rate(0) == 1.0
    assert [second.learning_rate(step) for step in (4, 7)] == [2.0, 2.0]


def test_every_stage_is_described() -> None:
    assert plan().describe() == [
        "short: steps 1-3, 4 rows x 16 tokens, lr 0.01 (cosine)",
        "long: steps 4-6, 4 rows x 32 tokens, lr 0.005 (cosine)",
    ]


def test_rows_must_divide_over_ranks_and_microbatches() -> None:
    check_rows(plan(), dp_size=2, microbatch_rows=2)
    with pytest.raises(ValueError, match=r"64: 4 rows of 16\).*got dp 2 x 3\. Set it to 96, or "
                       r"training\.microbatch_rows to one of \[1, 2\]"):  # fmt: skip
        check_rows(plan(), dp_size=2, microbatch_rows=3)
    with pytest.raises(ValueError, match=r"got dp 8 x 1\. Set it to 128, or parallel\.dp to a"):
        check_rows(plan(), dp_size=8, microbatch_rows=1)
    six = {"a": {"sequence_length": 16, "steps": 4, "global_batch_tokens": 96, "lr": 1.0}}
    with pytest.raises(ValueError, match=r"Set it to 64 or 128, or training\.microbatch_rows to "
                       r"one of \[1, 3\]"):  # fmt: skip
        check_rows(plan(stages=six), dp_size=2, microbatch_rows=2)
