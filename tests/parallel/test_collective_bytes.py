"""Bytes and calls of collectives, planned, against those that real steps make."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from models.config import NeuronKind, SpikingConfig, ThresholdGrad
from models.expert_config import Balance, ExpertConfig
from models.mixer_config import (
    BranchConfig,
    BranchMerge,
    BranchNorm,
    BranchProjections,
    SinkConfig,
)
from models.recomputation import NOTHING, Recomputation
from parallel.collective_bytes import step_traffic
from parallel.collective_count import CollectiveCount
from parallel.config import ParallelConfig, PipelineSchedule, Precision, Shard
from parallel.planned import Job
from parallel.traffic import Kind, Traffic
from tests.parallel.planned_runs import SPIKING, RealRun, job_of
from tests.support.distributed import run_ranks

MOE = ExpertConfig(num_experts=4, intermediate_size=48, top_k=2, balance=Balance.bias)
EXPERTS = {"ffns": "[d e]*2", "moe": MOE}
FULL = {"ffns": "[d e]*2", "moe": replace(MOE, capacity_factor=1.25, num_experts=6)}
TRAINED_THRESHOLDS = SpikingConfig(neuron=NeuronKind.adaptive, threshold_grad=ThresholdGrad.through)
ALL, TWO = frozenset(range(4)), frozenset({0, 2})
WHOLE_BLOCKS = Recomputation(blocks=TWO)
PARTS = Recomputation(norms=ALL, activations=TWO, mixers=TWO)
NORMS = Recomputation(norms=TWO)
MIXERS = "L+S S+F F L+F"
BRANCHES = {"mixers": MIXERS, "branches": BranchConfig(merge=BranchMerge.learned)}
APART = {"mixers": MIXERS, "branches": BranchConfig(projections=BranchProjections.separate)}
AFTER = {"mixers": MIXERS, "branches": BranchConfig(norm=BranchNorm.after_output)}

SHARED = replace(MOE, num_shared_experts=2, intermediate_size=16, balance=Balance.row)
FEW = replace(SHARED, num_shared_experts=0, balance=Balance.none, capacity_factor=1.25)


def short(**changes: Any) -> Job:
    """Two microbatches where data is not shared out."""
    return job_of(rows=4, **changes)


EXPERTS_CUT = [
    (
        short(model={"ffns": "d e d e", "moe": moe}, recompute=recompute, spiking=spiking),
        ParallelConfig(tp=2, sequence_parallel=is_cut),
    )
    for moe, recompute, spiking, is_cut in (
        (SHARED, NOTHING, SPIKING, True),
        (FEW, Recomputation(blocks=ALL), TRAINED_THRESHOLDS, False),
        (SHARED, Recomputation(norms=ALL, experts=frozenset({1, 3})), SPIKING, True),
        (SHARED, Recomputation(norms=ALL, expert_layers=frozenset({1, 3})), SPIKING, True),
        (FEW, NOTHING, TRAINED_THRESHOLDS, False),
        (SHARED, Recomputation(blocks=ALL), SPIKING, True),
        (replace(FEW, z_loss_coefficient=0.1), Recomputation(blocks=ALL), SPIKING, True),
        (FEW, Recomputation(blocks=ALL), SPIKING, True),
        (SHARED, Recomputation(norms=ALL, activations=ALL), SPIKING, True),
        (SHARED, Recomputation(expert_layers=frozenset({1})), TRAINED_THRESHOLDS, False),
    )
]

SINKS = SinkConfig(num_tokens=6)
PAST = SinkConfig(num_tokens=6, through_linear=False)
WITH = {"mixers": MIXERS, "sinks": SINKS, "ffns": "d e d e", "moe": SHARED}
DENSE = {"mixers": "L+S L F S", "sinks": PAST}
# No mixer reads the sinks that leave the second layer.
IDLE = {"mixers": "S L+F L _", "sinks": PAST, "ffns": "d e d e", "moe": FEW}
# Every expert gets every token and every sink.
EVEN = WITH | {"moe": replace(SHARED, num_experts=2, top_k=2)}
SINK_MODELS = (
    WITH, DENSE, IDLE, WITH | {"branches": BranchConfig(norm=BranchNorm.after_output)},
    IDLE | {"branches": BranchConfig(projections=BranchProjections.separate)},
)  # fmt: skip
OF_EXPERTS = Recomputation(experts=frozenset({1}), expert_layers=frozenset({3}), norms=TWO)
WITH_SINKS = [
    *(
        (job_of(model=model, recompute=recompute, spiking=TRAINED_THRESHOLDS),
         ParallelConfig(tp=2, sequence_parallel=is_cut))
        for model in SINK_MODELS
        for recompute, is_cut in (
            (NOTHING, True), (PARTS, True), (PARTS, False), (Recomputation(blocks=ALL), True),
        )
    ),
    *(
        (job_of(model=model, recompute=OF_EXPERTS, spiking=SPIKING),
         ParallelConfig(tp=2, sequence_parallel=True))
        for model in (WITH, IDLE)
    ),
    (job_of(model=DENSE), ParallelConfig(shard=Shard.parameters)),
    (job_of(model=WITH), ParallelConfig(pp=2)),
    (job_of(model=IDLE), ParallelConfig(pp=2, schedule=PipelineSchedule.interleaved)),
    (job_of(model=IDLE), ParallelConfig(pp=2, schedule=PipelineSchedule.zero_bubble)),
    *(
        (job_of(model=model, recompute=recompute, spiking=SPIKING), ParallelConfig(ep=2))
        for model in (WITH, IDLE)
        for recompute in (NOTHING, OF_EXPERTS, Recomputation(blocks=ALL))
    ),
]  # fmt: skip

CASES: dict[str, list[tuple[Job, ParallelConfig]]] = {
    "2": [
        (job_of(), ParallelConfig(shard=Shard.none)),
        (job_of(), ParallelConfig(shard=Shard.gradients)),
        (job_of(), ParallelConfig(shard=Shard.parameters)),
        (job_of(precision=Precision.bf16), ParallelConfig(shard=Shard.parameters)),
        (short(spiking=SPIKING), ParallelConfig(tp=2)),
        (
            short(spiking=TRAINED_THRESHOLDS, recompute=WHOLE_BLOCKS, precision=Precision.fp64),
            ParallelConfig(tp=2),
        ),
        (short(spiking=SPIKING), ParallelConfig(tp=2, sequence_parallel=True)),
        (short(recompute=WHOLE_BLOCKS), ParallelConfig(tp=2, sequence_parallel=True)),
        (
            short(recompute=PARTS, spiking=SPIKING),
            ParallelConfig(tp=2, sequence_parallel=True),
        ),
        *(
            (short(recompute=recompute, spiking=TRAINED_THRESHOLDS, model=model),
             ParallelConfig(tp=2, sequence_parallel=is_cut))
            for model, recompute, is_cut in (
                (BRANCHES, PARTS, True), (APART, WHOLE_BLOCKS, True), (AFTER, PARTS, True),
            )
        ),
        (job_of(model=APART, precision=Precision.bf16), ParallelConfig(shard=Shard.parameters)),
        (short(), ParallelConfig(pp=2)),
        (short(), ParallelConfig(pp=2, schedule=PipelineSchedule.zero_bubble)),
        (short(model={"tie_word_embeddings": True}), ParallelConfig(pp=2)),
        (
            short(model={"tie_word_embeddings": True}, frozen=frozenset({"embedding.weight"})),
            ParallelConfig(pp=2),
        ),
        *EXPERTS_CUT[:4],
        *WITH_SINKS[::5],
        (job_of(model=EXPERTS), ParallelConfig(ep=2)),
        (
            job_of(model=FULL, precision=Precision.bf16, recompute=WHOLE_BLOCKS),
            ParallelConfig(ep=2, shard=Shard.parameters),
        ),
        (job_of(model=EXPERTS, spiking=SPIKING), ParallelConfig(ep=2, shard=Shard.none)),
        (
            job_of(model=FULL, recompute=Recomputation(expert_layers=frozenset({1, 3}))),
            ParallelConfig(ep=2, shard=Shard.parameters),
        ),
    ],
    "2 slow": [
        *(
            (short(recompute=recompute, spiking=TRAINED_THRESHOLDS, model=model),
             ParallelConfig(tp=2))
            for model, recompute in ((BRANCHES, NOTHING), (APART, PARTS), (AFTER, NORMS))
        ),
        *EXPERTS_CUT[4:],
        (
            job_of(model=FULL, spiking=SPIKING, recompute=Recomputation(blocks=ALL)),
            ParallelConfig(ep=2),
        ),
        (
            job_of(model=EXPERTS, recompute=Recomputation(experts=frozenset({1}))),
            ParallelConfig(ep=2),
        ),
    ],
    "2 slow, sinks": WITH_SINKS,
    "4 slow": [
        *(
            (job_of(model=FULL, spiking=SPIKING, recompute=recompute),
             ParallelConfig(ep=2, tp=2, sequence_parallel=True))
            for recompute in (NOTHING, Recomputation(expert_layers=frozenset({1})))
        ),
        *(
            (job_of(model=model, spiking=SPIKING, recompute=OF_EXPERTS), parallel)
            for model, parallel in (
                (EVEN, ParallelConfig(ep=2, tp=2, sequence_parallel=True)),
                (WITH, ParallelConfig(pp=2, tp=2, sequence_parallel=True)),
                (IDLE, ParallelConfig(pp=2, tp=2)),
            )
        ),
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
        (job_of(model=FULL), ParallelConfig(ep=2, shard=Shard.parameters)),
        (job_of(model=EXPERTS), ParallelConfig(ep=2, shard=Shard.none)),
        (job_of(model=EXPERTS), ParallelConfig(ep=2, dp_replicate=2)),
        (job_of(model=EXPERTS, spiking=SPIKING), ParallelConfig(ep=2, pp=2)),
        # The second shard holds one row less.
        (job_of(model={"tie_word_embeddings": True}), ParallelConfig(pp=2)),
    ],
}  # fmt: skip


def counted(
    rank: int, world_size: int, cases: list[tuple[Job, ParallelConfig]]
) -> list[tuple[Counter[str], Counter[str], list[Traffic]]]:
    found = []
    for job, parallel in cases:
        run = RealRun.start(job, parallel)
        run.step(0)
        with CollectiveCount() as count:
            run.step(1)
        planned = step_traffic(run.given, run.mesh.pp_rank)
        found.append((count.calls, count.bytes, planned))
    return found


@pytest.mark.parametrize(
    "ranks", [pytest.param(n, marks=pytest.mark.slow if "slow" in n else ()) for n in CASES]
)
def test_calls_and_bytes_are_those_of_a_real_step(ranks: str, tmp_path: Path) -> None:
    results = run_ranks(counted, int(ranks[0]), CASES[ranks], tmp_path=tmp_path)
    routed = Kind.all_to_all.value
    for index, (_, parallel) in enumerate(CASES[ranks]):
        totals = Counter[str]()
        for rank, result in enumerate(results):
            calls, size, planned = result[index]
            expected: dict[str, Any] = {"calls": Counter(), "size": Counter()}
            for each in planned:
                expected["calls"][each.kind.value] += each.calls
                expected["size"][each.kind.value] += each.size
            # Which rank is sent how many rows depends on routing.
            totals["found"] += size.pop(routed, 0)
            totals["planned"] += expected["size"].pop(routed, 0)
            assert size == expected["size"], (rank, parallel)
            assert calls == expected["calls"], (rank, parallel)
        assert totals["found"] == totals["planned"], parallel
        assert (totals["found"] > 0) == (parallel.ep > 1)


def test_a_ring_sends_less_than_the_whole() -> None:
    assert Traffic("", Kind.all_gather, "tp", 1, 800).sent(4) == 600
    assert Traffic("", Kind.reduce_scatter, "tp", 1, 800).sent(4) == 600
    assert Traffic("", Kind.all_reduce, "tp", 1, 800).sent(4) == 1200
    assert Traffic("", Kind.send, "pp", 1, 800).sent(4) == 800
