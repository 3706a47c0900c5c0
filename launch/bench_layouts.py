"""What each rank of `launch.bench suite=parallel` does: steps of every layout, and their bytes.

One process is rank 0 alone on all threads while the others wait, in turn with the layout's steps.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from launch.bench_engine import STAGE, EngineRun, run_config
from launch.bench_rows import ExactRow, Row, Setting, compare
from parallel.collective_bytes import step_traffic
from parallel.collective_count import CollectiveCount
from parallel.config import ParallelConfig, PipelineSchedule, Shard
from parallel.mesh import Mesh, close, first_alone, init
from parallel.planned import Assignment, Layout
from parallel.traffic import Kind
from training.config import RunConfig
from training.planned_job import planned_job

LAYOUTS: Mapping[int, Mapping[str, ParallelConfig]] = {
    2: {
        "tp 2": ParallelConfig(tp=2),
        "tp 2, sequence parallel": ParallelConfig(tp=2, sequence_parallel=True),
        "pp 2, one_f_one_b": ParallelConfig(pp=2),
        "pp 2, interleaved": ParallelConfig(pp=2, schedule=PipelineSchedule.interleaved),
        "pp 2, zero_bubble": ParallelConfig(pp=2, schedule=PipelineSchedule.zero_bubble),
        "dp 2, replicated": ParallelConfig(shard=Shard.none),
        "dp 2, gradients sharded": ParallelConfig(shard=Shard.gradients),
        "dp 2, parameters sharded": ParallelConfig(shard=Shard.parameters),
    },
    4: {
        "tp 2 x pp 2": ParallelConfig(tp=2, pp=2),
        "tp 2 x dp 2": ParallelConfig(tp=2),
        "pp 2 x dp 2": ParallelConfig(pp=2),
        "tp 4": ParallelConfig(tp=4),
        "dp 4": ParallelConfig(),
        "pp 4": ParallelConfig(pp=4),
    },
}
"""Layouts by number of ranks."""


@dataclass(frozen=True, slots=True)
class RankJob:
    """Layouts to measure on the ranks of one start; all of them share `num_threads`."""

    setting: Setting
    layouts: Mapping[str, ParallelConfig]
    num_threads: int


def measure(job: RankJob) -> Iterator[Row]:
    """Rows of every layout; collective. Times are those that rank 0 sees."""
    world = init(job.setting.backend, ParallelConfig())
    torch.set_num_threads(max(1, job.num_threads // world.size))
    setting = replace(job.setting, device=world.device)
    beside = first_alone(world)
    baseline = None
    if beside is not None:
        config = run_config(setting, ParallelConfig())
        baseline = EngineRun.start(config, setting, beside)
    for name, parallel in job.layouts.items():
        config = run_config(setting, parallel)
        mesh = init(setting.backend, parallel)
        turns = Turns(EngineRun.start(config, setting, mesh), baseline, world, job.num_threads)
        yield _time(name, turns, setting)
        yield from bytes_rows(name, turns, planned_traffic(config, setting, mesh))
        del turns
        gc.collect()
    close(world)


@dataclass(frozen=True, slots=True)
class Turns:
    """Steps of a layout and of one process; each turn ends with all ranks waiting for it."""

    ours: EngineRun
    baseline: EngineRun | None
    world: Mesh
    num_threads: int

    def layout(self) -> None:
        """A step of the layout."""
        self.ours.step()
        self.world.barrier()

    def alone(self) -> None:
        """A step of rank 0 on all threads."""
        if self.baseline is not None:
            share = torch.get_num_threads()
            torch.set_num_threads(self.num_threads)
            self.baseline.step()
            torch.set_num_threads(share)
        self.world.barrier()


def _time(name: str, turns: Turns, setting: Setting) -> Row:
    label = f"{name}: step of {turns.ours.num_targets} tokens vs one process"
    return compare(label, turns.layout, turns.alone, setting, unit="ms")


def planned_traffic(config: RunConfig, setting: Setting, mesh: Mesh) -> Counter[str]:
    """Bytes of each kind of collective that the planner says this rank takes part in."""
    names = setting.backend.kernels().names
    kernels = (names["linear_attention"], names["softmax_attention"])
    job = planned_job(config, STAGE, kernels=kernels)
    layout = Layout.of(config.parallel, mesh.size)
    given = Assignment.of(job, layout, shard_rank=mesh.place_of(mesh.rank).dp_shard)
    formula = Counter[str]()
    for each in step_traffic(given, mesh.pp_rank):
        formula[each.kind.value] += each.size
    return formula


def bytes_rows(name: str, turns: Turns, formula: Counter[str]) -> Iterator[Row]:
    """Sizes of a step's collectives, summed over ranks: counted beside the formula."""
    with CollectiveCount() as count:
        turns.ours.step()
    counted, planned = Counter[str](), Counter[str]()
    for of_rank in turns.world.gather((dict(count.bytes), dict(formula))):
        counted.update(of_rank[0])
        planned.update(of_rank[1])
    for kind in (kind.value for kind in Kind):
        ours, baseline = counted[kind], planned[kind]
        if ours or baseline:
            ratio = ours / baseline if baseline else None
            yield ExactRow(f"{name}: {kind} bytes vs formula", ours, baseline, ratio, "bytes", 1.0)
