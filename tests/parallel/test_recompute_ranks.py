"""Recomputation changes no bit of a layout, in bfloat16 and where collectives repeat.

The matrix compares layouts with one process in float64; here each layout is its own oracle, so that
bfloat16 can be compared too, whose norms and gates lie in FSDP units of their own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from models.expert_config import Balance, ExpertConfig
from models.mixer_config import BranchConfig, BranchMerge, BranchNorm, BranchProjections
from parallel.config import ParallelConfig, PipelineSchedule, Precision, Shard
from parallel.engine import TorchEngine
from tests.parallel.engine_cases import Case, Run, build_engine, train
from tests.parallel.layout_runs import runs_of

STEPS = 2


MOE = ExpertConfig(
    num_experts=5, top_k=2, capacity_factor=1.0, balance=Balance.previous_step,
    z_loss_coefficient=0.05,
)  # fmt: skip


def case(
    precision: Precision = Precision.bf16,
    branches: BranchConfig | None = None,
    moe: ExpertConfig | None = None,
    **axes: Any,
) -> Case:
    parallel = ParallelConfig(vocab_multiple=4, **axes)
    return Case(
        parallel=parallel, is_cuttable=True, microbatch_rows=2, precision=precision,
        branches=branches, moe=moe,
    )  # fmt: skip


BRANCHES = BranchConfig(merge=BranchMerge.learned)
APART = BranchConfig(
    merge=BranchMerge.learned,
    norm=BranchNorm.after_output,
    projections=BranchProjections.separate,
)
CASES = {
    "dp4 parameters": case(shard=Shard.parameters),
    "pp2 dp2 parameters": case(pp=2, shard=Shard.parameters),
    "pp2 dp2 parameters interleaved": case(
        pp=2, shard=Shard.parameters, schedule=PipelineSchedule.interleaved
    ),
    "tp2 dp2 parameters sequence": case(tp=2, sequence_parallel=True, shard=Shard.parameters),
    "tp2 pp2 sequence zero bubble": case(
        Precision.fp64, tp=2, pp=2, sequence_parallel=True, schedule=PipelineSchedule.zero_bubble
    ),
    "dp4 parameters branches": case(branches=BRANCHES, shard=Shard.parameters),
    "pp2 tp2 branches sequence apart": case(
        branches=APART, pp=2, tp=2, sequence_parallel=True, shard=Shard.parameters
    ),
    "dp4 parameters experts": case(moe=MOE, shard=Shard.parameters),
    "pp2 dp2 experts": case(moe=MOE, pp=2),
    "tp2 dp2 parameters sequence experts": case(
        moe=MOE, tp=2, sequence_parallel=True, shard=Shard.parameters
    ),
}

QUICK = {
    "pp2 dp2 parameters interleaved", "tp2 pp2 sequence zero bubble", "dp4 parameters experts",
}  # fmt: skip
"""For `make check`: every axis, and experts; the matrices recompute branches in float64."""
NAMES = [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES]


def differences(engine: TorchEngine, case: Case) -> list[str]:
    """What differs between a run with and one without recomputation."""
    kept = train(engine, case, last=STEPS)
    again = [replace(case, selective=True)]
    if case.moe:
        again.append(replace(case, recompute=True))
    return [
        difference
        for each in again
        for difference in compare(kept, train(build_engine(engine.mesh, each), each, last=STEPS))
    ]


def compare(kept: Run, again: Run) -> list[str]:
    found = [
        field
        for field in ("losses", "norms", "statistics", "routing")
        if getattr(kept, field) != getattr(again, field)
    ]
    for field in ("gradients", "parameters"):
        before, after = getattr(kept, field), getattr(again, field)
        assert before.keys() == after.keys()
        found += [f"{field} {n}" for n in before if not torch.equal(before[n], after[n])]
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The differences of a layout by its name."""
    return runs_of({4: CASES}, QUICK, tmp_path_factory, differences)


@pytest.mark.parametrize("name", NAMES)
def test_no_bit_changes(found: Any, name: str) -> None:
    assert found(name) == []
