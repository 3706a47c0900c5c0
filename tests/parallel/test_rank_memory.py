"""Planned bytes of a rank against those of real engines: what rests exactly, the peak closely."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from models.expert_config import Balance, ExpertConfig
from models.mixer_config import (
    BranchConfig,
    BranchMerge,
    BranchNorm,
    BranchProjections,
    FeatureMap,
    GateKind,
    LinearAttentionConfig,
    SinkConfig,
    SinkRope,
)
from models.recomputation import Recomputation
from parallel.boxes import local_of
from parallel.config import ParallelConfig, PipelineSchedule, Precision, Shard
from parallel.planned import Assignment, Job, Layout
from parallel.rank_memory import RankMemory, rank_memory
from tests.parallel.planned_runs import SPIKING, RealRun, job_of, storage_bytes
from tests.support.allocations import peak_bytes, resting_bytes
from tests.support.distributed import run_ranks

ALL = frozenset(range(4))
# The measured error is below 1 %, with a split backward 3 %; the planner promises 5 %.
PEAK_TOLERANCE = 0.035


@dataclass(frozen=True)
class Measured:
    """Bytes of one rank of a real run."""

    weights: int
    gradients: int
    optimizer: int
    peak: int


TIED = LinearAttentionConfig(feature_map=FeatureMap.sigmoid, gate=GateKind.key_tied)
BRANCHES = {
    "mixers": "[L+S L+F]*2", "linear": TIED, "branches": BranchConfig(merge=BranchMerge.learned),
}  # fmt: skip
APART = BRANCHES | {
    "branches": BranchConfig(
        merge=BranchMerge.learned,
        norm=BranchNorm.after_output,
        projections=BranchProjections.separate,
    )
}
MOE = ExpertConfig(num_experts=4, num_shared_experts=1, intermediate_size=88)
TIGHT = replace(MOE, top_k=2, capacity_factor=1.0, z_loss_coefficient=0.1)
# Dropless, but as even as it can be.
EVERY = replace(MOE, num_experts=2, top_k=2)
DROPLESS, CAPACITY, EVEN = ({"ffns": "d e e e", "moe": moe} for moe in (MOE, TIGHT, EVERY))
# Experts that take more than what they make.
LARGE = {"ffns": "d e e e", "moe": replace(TIGHT, intermediate_size=400)}
E = frozenset({1, 2, 3})
SINKS = SinkConfig(num_tokens=16)
WITH_SINKS = {"sinks": SINKS, "mixers": "L S F L"}
PAST = BRANCHES | {"sinks": replace(SINKS, through_linear=False, rope=SinkRope.none)}
AFTER = APART | {"sinks": SINKS, "ffns": "d e e e", "moe": TIGHT}
# What a microbatch leaves behind adds up.
MANY = job_of(rows=16, microbatch_rows=1)
CASES: dict[int, list[tuple[Job, ParallelConfig]]] = {
    1: [
        (job_of(), ParallelConfig()),
        (job_of(microbatch_rows=8, spiking=SPIKING), ParallelConfig()),
        (job_of(precision=Precision.fp64, model={"qk_norm": True}), ParallelConfig()),
        (job_of(recompute=Recomputation(blocks=ALL)), ParallelConfig(shard=Shard.parameters)),
        (
            job_of(recompute=Recomputation(norms=ALL, activations=ALL), microbatch_rows=4),
            ParallelConfig(),
        ),
        (job_of(model={"tie_word_embeddings": True, "mixers": "S F _ L"}), ParallelConfig()),
        (job_of(frozen=frozenset({"embedding.weight"})), ParallelConfig()),
        (job_of(model=BRANCHES, spiking=SPIKING), ParallelConfig()),
        (job_of(model=BRANCHES, precision=Precision.bf16), ParallelConfig()),
        (job_of(model=APART, recompute=Recomputation(norms=ALL, mixers=ALL)), ParallelConfig()),
        *(
            (job_of(model=DROPLESS, recompute=recompute), ParallelConfig())
            for recompute in (
                Recomputation(),
                Recomputation(norms=ALL, activations=ALL),
                Recomputation(experts=E),
                Recomputation(norms=ALL, activations=ALL, expert_layers=E),
                Recomputation(blocks=ALL),
            )
        ),
        (job_of(model=CAPACITY, spiking=SPIKING), ParallelConfig()),
        *(
            (job_of(model=model, spiking=spiking, recompute=recompute, precision=precision),
             ParallelConfig())
            for model, spiking, recompute, precision in (
                (WITH_SINKS, SPIKING, Recomputation(), Precision.fp32),
                (PAST, SPIKING, Recomputation(norms=ALL, activations=ALL), Precision.fp32),
                (AFTER, SPIKING, Recomputation(mixers=ALL, experts=E), Precision.fp32),
                (WITH_SINKS, SPIKING, Recomputation(blocks=ALL), Precision.bf16),
            )
        ),
        (job_of(model=CAPACITY, precision=Precision.bf16), ParallelConfig()),
        # As in a real model, the product for the head's gradient outweighs a chunk of logits.
        (
            job_of(precision=Precision.bf16, loss_chunk_tokens=16, model={"vocab_size": 4000}),
            ParallelConfig(),
        ),
    ],
    2: [
        (job_of(), ParallelConfig(shard=Shard.parameters)),
        (job_of(), ParallelConfig(shard=Shard.gradients)),
        (job_of(), ParallelConfig(shard=Shard.none)),
        (job_of(), ParallelConfig(tp=2)),
        (job_of(), ParallelConfig(tp=2, sequence_parallel=True)),
        (job_of(model=BRANCHES), ParallelConfig(tp=2, sequence_parallel=True)),
        (job_of(model=APART), ParallelConfig(shard=Shard.parameters)),
        # Weights that outweigh activations: the buffers of a reduction are the peak.
        *(
            (job_of(model=model, length=16, precision=Precision.bf16),
             ParallelConfig(shard=Shard.parameters))
            for model in ({"intermediate_size": 400}, WITH_SINKS | {"intermediate_size": 400})
        ),
        (job_of(model=EVEN), ParallelConfig(ep=2)),
        (job_of(model=EVEN), ParallelConfig(ep=2, shard=Shard.parameters)),
        (job_of(model=EVEN), ParallelConfig(tp=2, sequence_parallel=True)),
        (job_of(model=CAPACITY), ParallelConfig(ep=2, shard=Shard.none)),
        (job_of(model=CAPACITY, spiking=SPIKING), ParallelConfig(ep=2)),
        (job_of(model=CAPACITY, precision=Precision.bf16), ParallelConfig(ep=2)),
        (job_of(model=CAPACITY, recompute=Recomputation(experts=E)), ParallelConfig(ep=2)),
        (job_of(model=CAPACITY, recompute=Recomputation(blocks=ALL)), ParallelConfig(ep=2)),
        (job_of(model=CAPACITY), ParallelConfig(pp=2)),
        (job_of(model=WITH_SINKS), ParallelConfig(pp=2)),
        (job_of(model=PAST), ParallelConfig(pp=2, schedule=PipelineSchedule.zero_bubble)),
        (job_of(model=WITH_SINKS), ParallelConfig(tp=2, sequence_parallel=True)),
        (job_of(model=PAST), ParallelConfig(shard=Shard.parameters)),
        (MANY, ParallelConfig(pp=2)),
        (job_of(), ParallelConfig(pp=2, schedule=PipelineSchedule.gpipe)),
        (MANY, ParallelConfig(pp=2, schedule=PipelineSchedule.interleaved)),
        (job_of(), ParallelConfig(pp=2, schedule=PipelineSchedule.zero_bubble)),
        (
            job_of(
                model={"tie_word_embeddings": True}, frozen=frozenset({"embedding.weight"}),
            ),
            ParallelConfig(pp=2),
        ),
    ],
    4: [
        (job_of(model=LARGE, length=16, rows=16, precision=precision), parallel)
        for precision, parallel in (
            (Precision.fp32, ParallelConfig(ep=2, shard=Shard.parameters)),
            (Precision.bf16, ParallelConfig(ep=2, dp_replicate=2)),
            (Precision.bf16, ParallelConfig(ep=2, pp=2)),
        )
    ],
}  # fmt: skip


def measure(job: Job, parallel: ParallelConfig) -> tuple[Measured, RankMemory]:
    """Bytes that a real run takes, and those planned for its rank."""
    before = resting_bytes()
    run = RealRun.start(job, parallel)
    # The first step pads shards and computes rotary tables, the second is like all others.
    run.step(0)
    run.step(1)
    resting = resting_bytes() - before
    # Alone nobody else frees anything.
    repeats = 1 if run.mesh.size == 1 else 3
    peak = resting + peak_bytes(lambda: run.step(2), repeats=repeats)
    return at_rest(run, peak), rank_memory(run.given, run.mesh.pp_rank)


def at_rest(run: RealRun, peak: int = 0) -> Measured:
    """Bytes of parameters, gradients and moments after a backward."""
    run.backward(3)
    parameters = [p for part in run.engine.parts for p in part.parameters()]
    gradients = [local_of(p.grad) for p in parameters if p.grad is not None]
    moments = [box.local for box in run.engine.optimizer_state().values()]
    return Measured(
        weights=storage_bytes([local_of(p) for p in parameters]),
        gradients=storage_bytes(gradients),
        # One counter a parameter with moments.
        optimizer=storage_bytes(moments) + sum(4 for moment in moments if moment.numel()) // 2,
        peak=peak,
    )


def measure_all(rank: int, world_size: int) -> list[tuple[Measured, RankMemory]]:
    return [measure(job, parallel) for job, parallel in CASES[world_size]]


SLOW = [pytest.param(size, marks=pytest.mark.slow) for size in (2, 4)]


@pytest.mark.parametrize("world_size", [1, *SLOW])
def test_memory_is_that_of_a_real_run(world_size: int, tmp_path: Path) -> None:
    results = run_ranks(measure_all, world_size, tmp_path=tmp_path)
    for index, (_, parallel) in enumerate(CASES[world_size]):
        for rank in range(world_size):
            measured, planned = results[rank][index]
            assert planned.weights == measured.weights, (rank, parallel)
            assert planned.gradients == measured.gradients, (rank, parallel)
            assert planned.optimizer == measured.optimizer, (rank, parallel)
            error = planned.peak / measured.peak - 1
            assert abs(error) < PEAK_TOLERANCE, (rank, parallel, error)


@pytest.mark.parametrize(
    ("model", "elements"),
    [
        ({"ffns": "d*4"}, 128 * 176),
        ({"ffns": "d*4", "intermediate_size": 16}, 128 * 64),
        # Twice as many rows as tokens; an expert as wide as the dense layer.
        ({"ffns": "d e e e", "moe": ExpertConfig(num_experts=4, top_k=2)}, 2 * 128 * 176),
        ({"ffns": "d e e e", "moe": replace(TIGHT, intermediate_size=80)}, 128 * 176),
        ({"ffns": "e*4", "moe": replace(TIGHT, num_shared_experts=3)}, 128 * 3 * 88),
        ({"ffns": "e*4", "moe": replace(TIGHT, capacity_factor=1.5)}, 128 * 3 * 88),
    ],
)
def test_the_largest_neuron_is_that_of_the_widest_site(
    model: dict[str, Any], elements: int
) -> None:
    given = Assignment.of(job_of(model=model, spiking=SPIKING), Layout.of(ParallelConfig(), 1))
    assert rank_memory(given, 0).neurons == elements * (4 + 4)


SIX = ExpertConfig(num_experts=6, intermediate_size=48, top_k=2, balance=Balance.bias)
EXPERTS: list[tuple[Job, ParallelConfig]] = [
    (job_of(model={"ffns": "[d e]*2", "moe": moe}), parallel)
    for moe in (SIX, replace(SIX, intermediate_size=45))
    for parallel in (
        ParallelConfig(ep=2),
        ParallelConfig(ep=2, dp_replicate=2, shard=Shard.parameters),
        ParallelConfig(ep=2, shard=Shard.none),
        ParallelConfig(),
    )
]
"""Three experts a rank, or six, over pairs or all of the ranks: along rows, or unevenly."""


def experts_at_rest(rank: int, world_size: int) -> list[tuple[Measured, RankMemory]]:
    results = []
    for job, parallel in EXPERTS:
        run = RealRun.start(job, parallel)
        results.append((at_rest(run), rank_memory(run.given, run.mesh.pp_rank)))
    return results


@pytest.mark.slow
def test_experts_at_rest_are_those_of_a_real_run(tmp_path: Path) -> None:
    for rank, results in enumerate(run_ranks(experts_at_rest, 4, tmp_path=tmp_path)):
        for (_, parallel), (measured, planned) in zip(EXPERTS, results, strict=True):
            assert planned.weights == measured.weights, (rank, parallel)
            assert planned.gradients == measured.gradients, (rank, parallel)
            assert planned.optimizer == measured.optimizer, (rank, parallel)
