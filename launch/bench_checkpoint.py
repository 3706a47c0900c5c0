"""Rows of `launch.bench` about checkpoints: their size, how long they hold training, its steps."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from launch.bench_engine import EngineRun, run_config
from launch.bench_rows import ExactRow, Row, Setting, median_seconds, seconds
from models.layouts import parameter_layouts
from parallel.boxes import Box
from parallel.checkpoint import save, step_directory
from parallel.checkpoint_writer import CheckpointWriter
from parallel.config import ParallelConfig
from parallel.mesh import Mesh, close, init
from parallel.rank_memory import COUNTER_BYTES
from training.checkpoint import tensors
from training.config import RunConfig
from training.planned_job import planned_memory

HELD_GOAL = 0.5
"""A save in the background may hold training for this share of one in the foreground."""


def checkpoint(setting: Setting) -> Iterator[Row]:
    """Asynchronous saves of weights and optimizer state against synchronous ones, one process.

    They go where temporary files go: TMPDIR chooses the disk, which needs room for two.
    """
    mesh = init(setting.backend, ParallelConfig(), environment={})
    try:
        config = run_config(setting, ParallelConfig())
        run = EngineRun.start(config, setting, mesh)
        with tempfile.TemporaryDirectory(prefix="synfire-bench-") as folder:
            saves = _Saves(run, mesh, step_directory(Path(folder), 1))
            yield _size_row(saves, config, setting)
            yield from _time_rows(saves, setting)
    finally:
        close(mesh)


def planned_bytes(config: RunConfig, setting: Setting) -> int:
    """What the planner says of weights and moments on one rank."""
    names = setting.backend.kernels().names
    kernels = (names["linear_attention"], names["softmax_attention"])
    (memory,) = planned_memory(config, num_ranks=1, kernels=kernels)
    # Each parameter's count of updates is the same number, which is kept apart.
    counters = COUNTER_BYTES * len(parameter_layouts(config.model))
    return memory.weights + memory.optimizer - counters


@dataclass(slots=True)
class _Saves:
    """Saves of one engine to one place, in the foreground and beside a step."""

    run: EngineRun
    mesh: Mesh
    directory: Path
    held: list[float] = field(default_factory=list)
    written: list[float] = field(default_factory=list)

    @property
    def boxes(self) -> Mapping[str, Box]:
        return tensors(self.run.engine)

    @property
    def num_bytes(self) -> int:
        """Of the tensors."""
        return sum(box.local.numel() * box.local.element_size() for box in self.boxes.values())

    def in_foreground(self) -> None:
        save(self.directory, self.boxes, {}, mesh=self.mesh)

    def beside_a_step(self, writer: CheckpointWriter, setting: Setting) -> float:
        """Seconds of the step; notes how long training was held and how long writing took."""
        snapshot = writer.take(self.boxes)
        self.held.append(snapshot.stall_seconds)

        def work(background: Mesh) -> None:
            started = time.perf_counter()
            save(self.directory, snapshot.boxes, {}, mesh=background)
            self.written.append(time.perf_counter() - started)

        writer.start(self.directory, work)
        step_seconds = seconds(self.run.step, setting)
        writer.finish()
        return step_seconds


def _size_row(saves: _Saves, config: RunConfig, setting: Setting) -> Row:
    size, planned = saves.num_bytes, planned_bytes(config, setting)
    name = "checkpoint: bytes of weights and moments vs plan"
    return ExactRow(name, size, planned, size / planned, "bytes", 1.0)


def _time_rows(saves: _Saves, setting: Setting) -> Iterator[Row]:
    writer = CheckpointWriter(saves.mesh)
    try:
        alone = median_seconds(saves.run.step, setting)
        saves.beside_a_step(writer, setting)
        pairs = [
            (seconds(saves.in_foreground, setting), saves.beside_a_step(writer, setting))
            for _ in range(setting.repeats)
        ]
    finally:
        writer.close()
    first, *held = saves.held
    foreground = statistics.median(pair[0] for pair in pairs)
    beside = statistics.median(pair[1] for pair in pairs)
    written = statistics.median(saves.written[1:])
    name = f"checkpoint of {saves.num_bytes / 1e9:.3g} GB"

    def row(what: str, ours: float, baseline: float, goal: float | None = None) -> Row:
        return Row(f"{name}: {what}", ours, baseline, ours / baseline, "s", goal)

    yield row("training held, asynchronous vs not", statistics.median(held), foreground, HELD_GOAL)
    yield row("held by the first, which finds its memory", first, foreground)
    yield row("written beside training vs not", written, foreground)
    yield row("a step with a save beside it vs without", beside, alone)
