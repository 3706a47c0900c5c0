"""A whole run on one layout before it is run: all its curriculum stages, as a run would cut them.

From a run's config to the planner's arithmetic in `parallel`; the checks are those of a run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

from launch.plan_stage import PlannedStage
from parallel.backend.devices import Device
from parallel.config import ParallelConfig
from parallel.planned import Assignment, Layout
from training.config import RunConfig
from training.layout import check_layout, cut_stages
from training.planned_job import planned_job, planned_kernels
from training.stages import build_plan


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRun:
    """Every curriculum stage of a run on one layout."""

    stages: tuple[PlannedStage, ...]

    @property
    def first(self) -> PlannedStage:
        """The first stage: what all of them share is its too."""
        return self.stages[0]

    @property
    def peak_bytes(self) -> int:
        """Of the fullest rank in the stage that takes most."""
        return max(stage.peak_bytes for stage in self.stages)

    @property
    def fits(self) -> bool:
        """Whether every stage does."""
        return all(stage.fits for stage in self.stages)

    @property
    def seconds(self) -> float | None:
        """Of all steps, without evaluation, checkpoints and start-up; None where unknown."""
        total = 0.0
        for stage in self.stages:
            if stage.time is None:
                return None
            total += stage.num_steps * stage.time.seconds
        return total

    def timed(self) -> Self:
        """The run with communication and time of its stages."""
        return replace(self, stages=tuple(stage.timed() for stage in self.stages))


def wanted_devices(parallel: ParallelConfig) -> int:
    """Ranks that a layout asks for by itself; axes left to be derived count one."""
    shards = parallel.dp_shard
    if shards is None:
        dp = parallel.dp or math.lcm(parallel.dp_replicate, parallel.ep)
    else:
        dp = parallel.dp_replicate * shards
    return parallel.pp * parallel.tp * dp


def plan_run(config: RunConfig, device: Device, num_devices: int) -> PlannedRun:
    """Memory of a run on `num_devices` of a device.

    Raises:
        ValueError: a layout that cannot run, as `launch.train` would refuse it.
    """
    layout = Layout.of(config.parallel, num_devices)
    plan = build_plan(config)
    check_layout(config, plan, dp_size=layout.dp)
    cuts = cut_stages(config)
    kernels = planned_kernels(device.kernels, config.training.precision)
    stages = []
    for stage in plan.stages:
        given = Assignment.of(planned_job(config, stage.name, kernels=kernels), layout, stages=cuts)
        num_steps = stage.end_step - stage.first_step
        stages.append(PlannedStage.of(stage.name, num_steps, given, device))
    return PlannedRun(stages=tuple(stages))
