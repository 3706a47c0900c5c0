"""Every layout trains the same model with sink tokens: as `test_expert_layouts`, `[L+S L+F]*2`.

The oracle is the plain model in one process with every expert on every token; that it is right
about sinks, `tests.models.test_sinks` shows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from models.expert_config import ExpertConfig
from models.lesson import Goals
from models.mixer_config import BranchConfig, BranchMerge, BranchNorm, SinkConfig, SinkRope
from models.sequence import SequenceContext
from parallel.backend.cpu import CpuBackend
from parallel.config import ParallelConfig, PipelineSchedule, Precision, Shard
from parallel.engine import TorchEngine
from parallel.mesh import init
from tests.parallel.engine_cases import (
    Case,
    Run,
    build_engine,
    rows_of,
    spikes_of,
    train,
)
from tests.parallel.engine_oracle import (
    assert_same_run,
    assert_same_spikes,
    expected_run,
    plain_model,
)
from tests.parallel.layout_runs import runs_of
from tests.support.closeness import assert_close
from tests.support.distributed import run_ranks

MOE = ExpertConfig(
    num_experts=5, intermediate_size=12, balance_coefficient=0.5, z_loss_coefficient=0.05,
    capacity_factor=1.0,
)  # fmt: skip
SINKS = SinkConfig(num_tokens=8)
PAST = replace(SINKS, through_linear=False, rope=SinkRope.none)
ABSOLUTE = replace(SINKS, rope=SinkRope.absolute)
AFTER = BranchConfig(merge=BranchMerge.learned, norm=BranchNorm.after_output)
TEACHER = Goals(kl=0.5, hidden=0.25, temperature=2.0)
KL = Goals(kl=0.5, hidden=0.0, temperature=1.0)


def case(sinks: SinkConfig = SINKS, *, rows: int = 2, **axes: Any) -> Case:
    fixed = {"branches": BranchConfig(merge=BranchMerge.learned), "moe": MOE}
    extra = {name: axes.pop(name) for name in list(axes) if name in Case.__dataclass_fields__}
    parallel = ParallelConfig(vocab_multiple=4, **axes)
    options = fixed | extra
    return Case(parallel=parallel, is_cuttable=True, microbatch_rows=rows, sinks=sinks, **options)


INTERLEAVED = {"pp": 2, "schedule": PipelineSchedule.interleaved}
ZERO_BUBBLE = {"pp": 2, "schedule": PipelineSchedule.zero_bubble}
PLAIN_LAYERS = {"branches": None, "moe": None}
"""`L S F L`: the last stage, interleaved, has a linear mixer alone."""
ONE = {
    "one row": case(rows=1),
    "recomputed": case(recompute=True),
    "selective": case(PAST, selective=True),
}
TWO = {
    "tp2": case(tp=2),
    "tp2 past through": case(PAST, tp=2, through=True),
    "tp2 after selective": case(ABSOLUTE, tp=2, branches=AFTER, selective=True),
    "tp2 sequence": case(tp=2, sequence_parallel=True),
    "tp2 sequence past recomputed": case(PAST, tp=2, sequence_parallel=True, recompute=True),
    "tp2 sequence after selective": case(
        ABSOLUTE, tp=2, sequence_parallel=True, branches=AFTER, selective=True
    ),
    "tp2 sequence teacher": case(
        tp=2, sequence_parallel=True, teacher=TEACHER, teacher_sinks=ABSOLUTE
    ),
    "pp2": case(pp=2),
    "pp2 past selective": case(PAST, pp=2, selective=True),
    "pp2 recomputed": case(pp=2, recompute=True),
    "pp2 an empty last stage": case(pp=2, stage_layers=[4, 0]),
    "pp2 interleaved": case(**INTERLEAVED),
    "pp2 interleaved past": case(PAST, **INTERLEAVED, **PLAIN_LAYERS),
    "pp2 interleaved an empty stage": case(**INTERLEAVED, stage_layers=[1, 0, 2, 1]),
    "pp2 zero bubble": case(**ZERO_BUBBLE),
    "pp2 zero bubble past": case(PAST, **ZERO_BUBBLE, virtual_stages=2, **PLAIN_LAYERS),
    "pp2 teacher": case(pp=2, teacher=TEACHER),
    "pp2 zero bubble teacher": case(**ZERO_BUBBLE, teacher=TEACHER, teacher_sinks=PAST),
    "pp2 interleaved teacher": case(
        SinkConfig(), **INTERLEAVED, teacher=KL, teacher_sinks=ABSOLUTE
    ),
    "dp2": case(),
    "dp2 none past": case(PAST, shard=Shard.none),
    "dp2 parameters selective": case(shard=Shard.parameters, selective=True, rows=1),
    "dp2 teacher": case(teacher=TEACHER, teacher_sinks=SINKS),
}
FOUR = {
    "tp2 pp2": case(tp=2, pp=2),
    "tp2 pp2 sequence past": case(PAST, tp=2, pp=2, sequence_parallel=True),
    "tp2 pp2 sequence teacher": case(
        tp=2, pp=2, sequence_parallel=True, teacher=KL, teacher_sinks=ABSOLUTE
    ),
    "pp2 dp2 zero bubble parameters": case(**ZERO_BUBBLE, shard=Shard.parameters),
    "tp2 dp2 parameters": case(tp=2, shard=Shard.parameters),
}
LAYOUTS: dict[int, dict[str, Case]] = {1: ONE, 2: TWO, 4: FOUR}
CASES = {name: each for cases in LAYOUTS.values() for name, each in cases.items()}
QUICK = {
    "selective", "tp2 sequence after selective", "pp2 past selective", "pp2 zero bubble teacher",
    "pp2 an empty last stage", "dp2 parameters selective",
}  # fmt: skip
NAMES = [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The run of a layout by its name, and what it evaluated before."""
    return runs_of(LAYOUTS, QUICK, tmp_path_factory, evaluate_and_train)


@dataclass(frozen=True)
class Evaluated:
    """A run, and the losses of a step's rows before it."""

    run: Run
    losses: NDArray[np.float64]


def evaluate_and_train(engine: TorchEngine, case: Case) -> Evaluated:
    losses = engine.token_losses(rows_of(9), spikes=spikes_of(case))
    return Evaluated(train(engine, case), losses.numpy())


@pytest.mark.parametrize("name", NAMES)
def test_equals_one_process(runs: Any, name: str) -> None:
    each = CASES[name]
    expected = expected_run(each.oracle())
    if each.sinks.num_tokens:
        assert float(expected.gradients["sinks.weight"].abs().max()) > 1e-4
    assert_same_run(runs(name).run, expected)


@pytest.mark.parametrize("name", NAMES)
def test_spikes_are_counted_as_in_one_process(runs: Any, name: str) -> None:
    assert_same_spikes(runs(name).run, CASES[name])


@pytest.mark.parametrize("name", NAMES)
def test_evaluates_as_one_process(runs: Any, name: str) -> None:
    each = CASES[name]
    expected = evaluation(each.oracle())
    assert_close(torch.from_numpy(runs(name).losses), expected, relative=1e-11)


@functools.cache
def evaluation(case: Case) -> torch.Tensor:
    rows = rows_of(9)
    sequence = SequenceContext.from_document_ids(rows.document_ids)
    losses = plain_model(case).token_losses(
        rows.tokens, sequence, rows.labels, spikes=spikes_of(case)
    )
    assert isinstance(losses, torch.Tensor)
    return losses


def bfloat16_of(rank: int, world_size: int) -> list[tuple[float, dict[str, Any]]]:
    """Two steps in bfloat16, where a unit of float32 modules sees one call of each."""
    results = []
    for shard in (Shard.gradients, Shard.parameters):
        each = case(
            shard=shard, precision=Precision.bf16, spiking=False, rows=2, moe=None, branches=AFTER
        )
        engine = build_engine(init(CpuBackend(), each.parallel), each)
        run = train(engine, each, last=2)
        results.append((run.losses, {n: g.numpy() for n, g in run.gradients.items()}))
    return results


def test_gradients_of_bfloat16_are_near_those_of_float64(tmp_path: Any) -> None:
    """Each float32 unit waits for the sinks' part too: a lost one would be off by far more."""
    expected = expected_run(
        case(precision=Precision.fp64, spiking=False, moe=None, branches=AFTER).oracle()
    )
    for losses, gradients in run_ranks(bfloat16_of, 2, tmp_path=tmp_path)[0]:
        assert losses[0] == pytest.approx(expected.losses[0], rel=2e-2)
        for name, wanted in expected.gradients.items():
            found = torch.from_numpy(gradients[name]).double()
            error = float((found - wanted).norm() / wanted.norm())
            assert error < 0.15, (name, error)
