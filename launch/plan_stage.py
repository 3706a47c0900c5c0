"""What is known about one curriculum stage on one layout before it is run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from parallel.backend.devices import Device
from parallel.collective_bytes import step_traffic
from parallel.planned import Assignment, Job, Layout
from parallel.rank_memory import RankMemory, rank_memory
from parallel.roofline import StepTime, step_time
from parallel.traffic import Traffic

USABLE_MEMORY = 0.9
"""Share of a device's memory that a step may take: its driver, the collectives' own buffers and
fragments of the allocator need the rest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedStage:
    """What each pipeline coordinate's ranks hold, send and wait for; `time` None is unknown."""

    name: str
    num_steps: int
    given: Assignment
    device: Device
    memory: tuple[RankMemory, ...]
    traffic: tuple[tuple[Traffic, ...], ...] = ()
    time: StepTime | None = None

    @classmethod
    def of(cls, name: str, num_steps: int, given: Assignment, device: Device) -> Self:
        """The stage with its memory; `timed` adds what takes longer to work out."""
        memory = tuple(rank_memory(given, rank) for rank in range(given.layout.pp))
        return cls(name=name, num_steps=num_steps, given=given, device=device, memory=memory)

    def timed(self) -> Self:
        """The stage with its communication and its time too."""
        ranks = range(self.layout.pp)
        traffic = tuple(tuple(step_traffic(self.given, rank)) for rank in ranks)
        time = step_time(self.given, self.device, self.memory, traffic)
        return replace(self, traffic=traffic, time=time)

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
