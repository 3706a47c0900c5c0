"""The curriculum: which stage a step belongs to, with its data, learning rate and length.

Steps count over the whole run and are 0 before the first one; a stage counts its own from 0 too.
Owns no data and no optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass

from data.config import DataConfig
from training.config import RunConfig, ScheduleConfig, StageConfig
from training.lr_schedule import check_schedule, learning_rate


@dataclass(frozen=True, slots=True)
class Stage:
    """One resolved curriculum entry: the steps `first_step` (included) to `end_step` (excluded)."""

    name: str
    config: StageConfig
    schedule: ScheduleConfig
    data: DataConfig
    first_step: int
    end_step: int

    def learning_rate(self, step: int) -> float:
        """Learning rate of the step after `step` finished ones."""
        return learning_rate(
            step - self.first_step + 1,
            peak=self.config.lr,
            num_steps=self.config.steps,
            schedule=self.schedule,
        )


@dataclass(frozen=True, slots=True)
class StagePlan:
    """All stages of a run, in order, without gaps."""

    stages: tuple[Stage, ...]

    @property
    def total_steps(self) -> int:
        """Steps after which the run is done."""
        return self.stages[-1].end_step

    def stage_of(self, step: int) -> Stage:
        """Return the stage of the step after `step` finished ones; at the end, the last stage."""
        for stage in self.stages:
            if step < stage.end_step:
                return stage
        return self.stages[-1]

    def describe(self) -> list[str]:
        """One line a stage for the log."""
        return [
            f"{stage.name}: steps {stage.first_step + 1}-{stage.end_step}, "
            f"{stage.config.rows_per_step} rows x {stage.config.sequence_length} tokens, "
            f"lr {stage.config.lr:g} ({stage.schedule.kind.value})"
            for stage in self.stages
        ]


def build_plan(config: RunConfig) -> StagePlan:
    """Resolve the run's stages, cut or extended to `training.max_steps`.

    Raises:
        ValueError: a schedule that does not fit its stage, or `max_steps` below 1.
    """
    max_steps = config.training.max_steps
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"training.max_steps ({max_steps}) must be at least 1, or null.")
    stages: list[Stage] = []
    first = 0
    for index, (name, stage) in enumerate(config.stages.items()):
        schedule = stage.schedule if stage.schedule is not None else config.schedule
        check_schedule(schedule, num_steps=stage.steps, stage=name)
        is_last = index == len(config.stages) - 1
        end = first + stage.steps
        if max_steps is not None:
            end = max_steps if is_last else min(end, max_steps)
        data = stage.data if stage.data is not None else config.data
        stages.append(Stage(name, stage, schedule, data, first, end))
        if max_steps is not None and end >= max_steps:
            break
        first = end
    return StagePlan(tuple(stages))


def check_rows(plan: StagePlan, *, dp_size: int, microbatch_rows: int) -> None:
    """Refuse batches that cannot be split evenly over ranks and microbatches.

    Raises:
        ValueError: naming the stage, the two numbers and the nearest valid values.
    """
    unit = dp_size * microbatch_rows
    for stage in plan.stages:
        rows, length = stage.config.rows_per_step, stage.config.sequence_length
        if rows % unit == 0:
            continue
        below, above = rows // unit * unit, -(-rows // unit) * unit
        tokens = " or ".join(str(valid * length) for valid in (below, above) if valid)
        fitting = [size for size in range(1, rows // dp_size + 1) if rows % (dp_size * size) == 0]
        other = (
            f", or training.microbatch_rows to one of {fitting}"
            if fitting
            else f", or parallel.dp to a divisor of {rows}"
        )
        raise ValueError(
            f"stages.{stage.name}.global_batch_tokens ({stage.config.global_batch_tokens}: {rows} "
            f"rows of {length}) must be a multiple of dp x microbatch_rows rows: got dp {dp_size} "
            f"x {microbatch_rows}. Set it to {tokens}{other}."
        )
