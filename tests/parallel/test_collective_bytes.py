"""Bytes and calls of collectives, planned, against those that real steps make."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from models.config import NeuronKind, SpikingConfig, ThresholdGrad
from models.mixer_config import BranchConfig, BranchMerge, BranchNorm, BranchProjections
from models.recomputation import NOTHING, Recomputation
from parallel.collective_bytes import Kind, Traffic, step_traffic
from parallel.collective_count import CollectiveCount
from parallel.config import ParallelConfig, PipelineSchedule, Precision, Shard
from parallel.planned import Job
from tests.parallel.planned_runs import SPIKING, RealRun, job_of
from tests.support.distributed import run_ranks

TRAINED_THRESHOLDS = SpikingConfig(neuron=NeuronKind.adaptive, threshold_grad=ThresholdGrad.through)
ALL, TWO = frozenset(range(4)), frozenset({0, 2})
WHOLE_BLOCKS = Recomputation(blocks=TWO)
PARTS = Recomputation(norms=ALL, activations=TWO, mixers=TWO)
NORMS = Recomputation(norms=TWO)
MIXERS = "L+S S+F F L+F"
BRANCHES = {"mixers": MIXERS, "branches": BranchConfig(merge=BranchMerge.learned)}
APART = {"mixers": MIXERS, "branches": BranchConfig(projections=BranchProjections.separate)}
AFTER = {"mixers": MIXERS, "branches": BranchConfig(norm=BranchNorm.after_output)}

CASES: dict[int, list[tuple[Job, ParallelConfig]]] = {
    2: [
        (job_of(), ParallelConfig(shard=Shard.none)),
        (job_of(), ParallelConfig(shard=Shard.gradients)),
        (job_of(), ParallelConfig(shard=Shard.parameters)),
        (job_of(precision=Precision.bf16), ParallelConfig(shard=Shard.parameters)),
        (job_of(spiking=SPIKING), ParallelConfig(tp=2)),
        (
            job_of(spiking=TRAINED_THRESHOLDS, recompute=WHOLE_BLOCKS, precision=Precision.fp64),
            ParallelConfig(tp=2),
        ),
        (job_of(spiking=SPIKING), ParallelConfig(tp=2, sequence_parallel=True)),
        (job_of(recompute=WHOLE_BLOCKS), ParallelConfig(tp=2, sequence_parallel=True)),
        (
            job_of(recompute=PARTS, spiking=SPIKING),
            ParallelConfig(tp=2, sequence_parallel=True),
        ),
        *(
            (job_of(recompute=recompute, spiking=TRAINED_THRESHOLDS, model=model),
             ParallelConfig(tp=2, sequence_parallel=is_cut))
            for model, recompute, is_cut in (
                (BRANCHES, NOTHING, False), (BRANCHES, PARTS, True), (APART, PARTS, False),
                (APART, WHOLE_BLOCKS, True), (AFTER, PARTS, True), (AFTER, NORMS, False),
            )
        ),
        (job_of(model=APART, precision=Precision.bf16), ParallelConfig(shard=Shard.parameters)),
        (job_of(), ParallelConfig(pp=2)),
        (job_of(), ParallelConfig(pp=2, schedule=PipelineSchedule.zero_bubble)),
        (job_of(model={"tie_word_embeddings": True}), ParallelConfig(pp=2)),
        (
            job_of(model={"tie_word_embeddings": True}, frozen=frozenset({"embedding.weight"})),
            ParallelConfig(pp=2),
        ),
    ],
    4: [
        (job_of(), ParallelConfig(dp_replicate=2, dp_shard=2)),
        (job_of(), ParallelConfig(tp=2, shard=Shard.parameters)),
        (job_of(), ParallelConfig(pp=2, shard=Shard.parameters)),
        (
            job_of(),
            ParallelConfig(
                pp=2, schedule=PipelineSchedule.interleaved, shard=Shard.parameters, tp=2,
                sequence_parallel=True,
            ),
        ),
        # The second shard holds one row less.
        (job_of(model={"tie_word_embeddings": True}), ParallelConfig(pp=2)),
    ],
}  # fmt: skip


def counted(rank: int, world_size: int) -> list[tuple[Counter[str], Counter[str], list[Traffic]]]:
    found = []
    for job, parallel in CASES[world_size]:
        run = RealRun.start(job, parallel)
        run.step(0)
        with CollectiveCount() as count:
            run.step(1)
        planned = step_traffic(run.given, run.mesh.pp_rank)
        found.append((count.calls, count.bytes, planned))
    return found


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_calls_and_bytes_are_those_of_a_real_step(world_size: int, tmp_path: Path) -> None:
    for rank, result in enumerate(run_ranks(counted, world_size, tmp_path=tmp_path)):
        for (_, parallel), (calls, size, planned) in zip(CASES[world_size], result, strict=True):
            expected: dict[str, Any] = {"calls": Counter(), "size": Counter()}
            for each in planned:
                expected["calls"][each.kind.value] += each.calls
                expected["size"][each.kind.value] += each.size
            assert dict(size) == dict(expected["size"]), (rank, parallel)
            assert dict(calls) == dict(expected["calls"]), (rank, parallel)


def test_a_ring_sends_less_than_the_whole() -> None:
    assert Traffic("", Kind.all_gather, "tp", 1, 800).sent(4) == 600
    assert Traffic("", Kind.reduce_scatter, "tp", 1, 800).sent(4) == 600
    assert Traffic("", Kind.all_reduce, "tp", 1, 800).sent(4) == 1200
    assert Traffic("", Kind.send, "pp", 1, 800).sent(4) == 800
