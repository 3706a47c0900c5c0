"""The learning rate of a step: warm-up, then the shape of the stage. A pure function, no state.

Time is counted in steps of the stage, from 1: step t of n has `t / n` behind it, so the warm-up's
last step has the full rate and the stage's last step has the final one.
"""

from __future__ import annotations

import math

from training.config import ScheduleConfig, ScheduleKind


def learning_rate(
    stage_step: int, *, peak: float, num_steps: int, schedule: ScheduleConfig
) -> float:
    """Learning rate of one step.

    Args:
        stage_step: 1 for the stage's first step. Above `num_steps` the final rate goes on.
        peak: the rate after warm-up.
        num_steps: the stage's configured length.
        schedule: the shape.
    """
    if stage_step <= schedule.warmup_steps:
        return peak * stage_step / schedule.warmup_steps
    if schedule.kind is ScheduleKind.constant:
        return peak
    decay_steps = num_decay_steps(schedule, num_steps)
    decay_start = (
        schedule.warmup_steps
        if schedule.kind is ScheduleKind.cosine
        else max(num_steps - decay_steps, schedule.warmup_steps)
    )
    done = min(1.0, max(0, stage_step - decay_start) / max(1, decay_steps))
    if schedule.kind is ScheduleKind.cosine:
        remaining = 0.5 * (1.0 + math.cos(math.pi * done))
    else:
        remaining = 1.0 - done
    return peak * (schedule.min_lr_factor + (1.0 - schedule.min_lr_factor) * remaining)


def num_decay_steps(schedule: ScheduleConfig, num_steps: int) -> int:
    """Steps over which the rate falls.

    `decay_steps` where it is set; else all steps after warm-up (cosine), the last fifth of the
    stage (warmup_stable_decay) or none (constant).
    """
    available = max(0, num_steps - schedule.warmup_steps)
    if schedule.kind is ScheduleKind.constant:
        return 0
    if schedule.decay_steps is not None:
        return schedule.decay_steps
    if schedule.kind is ScheduleKind.cosine:
        return available
    return min(available, math.ceil(num_steps / 5))


def check_schedule(schedule: ScheduleConfig, *, num_steps: int, stage: str) -> None:
    """Refuse a schedule that cannot fit its stage.

    Raises:
        ValueError: negative lengths, a factor outside 0 to 1, or more steps than the stage has.
    """
    name = f"stages.{stage}.schedule"
    for key in ("warmup_steps", "decay_steps"):
        value = getattr(schedule, key)
        if value is not None and value < 0:
            raise ValueError(f"{name}.{key} ({value}) must be 0 or more.")
    if not 0.0 <= schedule.min_lr_factor <= 1.0:
        raise ValueError(
            f"{name}.min_lr_factor ({schedule.min_lr_factor}) must be between 0 and 1: "
            "it multiplies the stage's lr."
        )
    needed = schedule.warmup_steps + (schedule.decay_steps or 0)
    if needed > num_steps and schedule.kind is not ScheduleKind.constant:
        raise ValueError(
            f"{name}.warmup_steps + decay_steps ({needed}) must fit the stage: got steps "
            f"{num_steps}. Shorten the schedule or lengthen stages.{stage}.steps."
        )
