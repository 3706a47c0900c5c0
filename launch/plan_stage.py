"""One curriculum stage on one layout: what a rank holds, sends and waits for, before it is run.

From a run's config to the planner's arithmetic in `parallel`; the checks are those of a run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from parallel.backend.devices import Device
from parallel.collective_bytes import Traffic, step_traffic
from parallel.config import ParallelConfig, Precision
from parallel.planned import Assignment, Job, Layout
from parallel.rank_memory import RankMemory, rank_memory
from parallel.roofline import StepTime, step_time
from training.config import RunConfig
from training.layout import check_layout
from training.planned_job import planned_job
from training.stages import build_plan

USABLE_MEMORY = 0.9
"""Share of a device's memory that a step may take: its driver, the collectives' own buffers and
fragments of the allocator need the rest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedStage:
    """Everything that is known about a stage of a run on a layout before it is run."""

    name: str
    given: Assignment
    device: Device
    memory: tuple[RankMemory, ...]
    traffic: tuple[tuple[Traffic, ...], ...]
    time: StepTime | None

    @property
    def job(self) -> Job:
        """What is trained."""
        return self.given.job

    @property
    def layout(self) -> Layout:
        """On which axes."""
        return self.given.layout

    @property
    def peak_bytes(self) -> int:
        """Of the fullest rank."""
        return max(each.peak for each in self.memory)

    @property
    def usable_bytes(self) -> int:
        """Of a device, for a step."""
        return int(self.device.memory_bytes * USABLE_MEMORY)

    @property
    def fits(self) -> bool:
        """Whether every rank's peak is usable memory."""
        return self.peak_bytes <= self.usable_bytes


def wanted_devices(parallel: ParallelConfig) -> int:
    """Ranks that a layout asks for by itself; axes left to be derived count one."""
    dp = parallel.dp or parallel.dp_replicate * (parallel.dp_shard or 1)
    return parallel.pp * parallel.tp * dp


def plan_stage(
    config: RunConfig, name: str, device: Device, num_devices: int, *, only_fitting: bool = False
) -> PlannedStage:
    """Plan the curriculum stage `name` on `num_devices` of a device.

    With `only_fitting` nothing but the memory of a layout that does not fit is worked out.

    Raises:
        ValueError: a layout that cannot run, as `launch.train` would refuse it.
    """
    alone = replace(config, stages={name: config.stages[name]})
    layout = Layout.of(config.parallel, num_devices)
    check_layout(alone, build_plan(alone), dp_size=layout.dp)
    kernels = _kernels(device, config.training.precision)
    given = Assignment.of(planned_job(alone, name, kernels=kernels), layout)
    planned = PlannedStage(
        name=name,
        given=given,
        device=device,
        memory=tuple(rank_memory(given, rank) for rank in range(layout.pp)),
        traffic=(),
        time=None,
    )
    if only_fitting and not planned.fits:
        return planned
    traffic = tuple(tuple(step_traffic(given, rank)) for rank in range(layout.pp))
    time = step_time(given, device, planned.memory, traffic)
    return replace(planned, traffic=traffic, time=time)


def _kernels(device: Device, precision: Precision) -> tuple[str, str]:
    """The device's, or those that compute instead of one that has no kernel for the precision."""
    linear, softmax = device.kernels
    if precision is Precision.fp64:
        linear = "chunked"
    if precision is not Precision.bf16:
        softmax = "blocked"
    return linear, softmax
