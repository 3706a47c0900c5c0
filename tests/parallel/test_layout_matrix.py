"""Every layout trains the same model: gradients, losses, norms, parameters, spikes, in float64.

The oracle is the plain model in one process, without any engine. Each parameter's gradient of step
1 is compared before any optimizer, which would hide a wrong scale.
"""

from __future__ import annotations

from typing import Any

import pytest

from models.lesson import Goals
from models.mixer_config import BranchConfig, BranchMerge, BranchNorm, BranchProjections
from parallel.config import ParallelConfig, PipelineSchedule, Precision, Shard
from tests.parallel.engine_cases import (
    Case,
    Rule,
    RuleName,
    Run,
)
from tests.parallel.engine_oracle import assert_same_run, assert_same_spikes, expected_run
from tests.parallel.layout_runs import runs_of
from tests.support.closeness import assert_close

FLOAT32_LOSS = 1e-5
FLOAT32_NORM = 1e-3


def case(*, rows: int = 2, **axes: Any) -> Case:
    extra = {name: axes.pop(name) for name in list(axes) if name in Case.__dataclass_fields__}
    parallel = ParallelConfig(vocab_multiple=4, **axes)
    return Case(parallel=parallel, is_cuttable=True, microbatch_rows=rows, **extra)


INTERLEAVED = {"pp": 2, "schedule": PipelineSchedule.interleaved}
ZERO_BUBBLE = {"pp": 2, "schedule": PipelineSchedule.zero_bubble}
TEACHER = Goals(kl=0.5, hidden=0.25, temperature=2.0)
SHARED = BranchConfig()
LEARNED = BranchConfig(merge=BranchMerge.learned)
AFTER = BranchConfig(merge=BranchMerge.learned, norm=BranchNorm.after_output)
SEPARATE = BranchConfig(merge=BranchMerge.mean, projections=BranchProjections.separate)
APART = BranchConfig(
    merge=BranchMerge.learned,
    norm=BranchNorm.after_output,
    projections=BranchProjections.separate,
)
TWO: dict[str, Case] = {
    "tp2": case(tp=2),
    "tp2 tied": case(tp=2, tied=True),
    "tp2 sequence": case(tp=2, sequence_parallel=True),
    "tp2 sequence tied recomputed": case(tp=2, sequence_parallel=True, tied=True, recompute=True),
    "tp2 selective": case(tp=2, selective=True),
    "tp2 sequence selective through": case(
        tp=2, sequence_parallel=True, selective=True, through=True
    ),
    "tp2 through": case(tp=2, through=True),
    "tp2 sequence through": case(tp=2, sequence_parallel=True, through=True),
    "tp2 sgd": case(tp=2, rule=Rule(RuleName.sgd)),
    "pp2": case(pp=2),
    "pp2 tied": case(pp=2, tied=True),
    "pp2 gpipe": case(pp=2, schedule=PipelineSchedule.gpipe),
    "pp2 recomputed": case(pp=2, recompute=True),
    "pp2 selective": case(pp=2, selective=True),
    "pp2 frozen": case(pp=2, frozen=True),
    "pp2 by hand": case(pp=2, stage_layers=[1, 3]),
    "pp2 interleaved": case(**INTERLEAVED),
    "pp2 interleaved tied": case(**INTERLEAVED, tied=True),
    "pp2 zero bubble": case(**ZERO_BUBBLE),
    "pp2 zero bubble tied": case(**ZERO_BUBBLE, tied=True),
    "pp2 zero bubble selective": case(**ZERO_BUBBLE, selective=True),
    "pp2 zero bubble virtual": case(**ZERO_BUBBLE, virtual_stages=2),
    "dp2": case(),
    "dp2 parameters": case(shard=Shard.parameters),
    "dp2 parameters selective": case(shard=Shard.parameters, selective=True),
    "dp2 none": case(shard=Shard.none),
    "dp2 teacher": case(teacher=TEACHER),
    "dp2 teacher parameters offloaded": case(teacher=TEACHER, shard=Shard.parameters, offload=True),
    "tp2 teacher": case(tp=2, teacher=TEACHER),
    "tp2 sequence teacher": case(tp=2, sequence_parallel=True, teacher=TEACHER),
    "pp2 teacher": case(pp=2, teacher=TEACHER),
    "pp2 interleaved teacher tied": case(**INTERLEAVED, teacher=TEACHER, tied=True),
    "pp2 zero bubble teacher": case(**ZERO_BUBBLE, teacher=TEACHER),
    "tp2 branches": case(tp=2, branches=LEARNED),
    "tp2 branches separate": case(tp=2, branches=SEPARATE),
    "tp2 branches after": case(tp=2, branches=AFTER),
    "tp2 branches sequence": case(tp=2, branches=LEARNED, sequence_parallel=True),
    "tp2 branches sequence after selective": case(
        tp=2, branches=AFTER, sequence_parallel=True, selective=True
    ),
    "tp2 branches sequence apart through": case(
        tp=2, branches=APART, sequence_parallel=True, through=True
    ),
    "pp2 branches": case(pp=2, branches=SHARED),
    "pp2 branches zero bubble after": case(**ZERO_BUBBLE, branches=AFTER),
    "pp2 branches apart recomputed": case(pp=2, branches=APART, recompute=True),
    "dp2 branches": case(branches=SHARED),
    "dp2 branches parameters apart selective": case(
        branches=APART, shard=Shard.parameters, selective=True
    ),
    "tp2 float32": case(tp=2, precision=Precision.fp32, spiking=False),
    "pp2 float32": case(pp=2, precision=Precision.fp32, spiking=False),
    "dp2 float32": case(precision=Precision.fp32, spiking=False),
}
FOUR: dict[str, Case] = {
    "tp4": case(tp=4),
    "tp4 sequence tied": case(tp=4, sequence_parallel=True, tied=True),
    "pp4": case(pp=4),
    "pp4 tied": case(pp=4, tied=True),
    "dp4": case(),
    "dp4 parameters": case(shard=Shard.parameters),
    "dp4 none": case(shard=Shard.none),
    "hsdp 2x2": case(dp_replicate=2),
    "hsdp 2x2 parameters": case(dp_replicate=2, shard=Shard.parameters),
    "tp2 pp2": case(tp=2, pp=2),
    "tp2 pp2 sequence tied": case(tp=2, pp=2, sequence_parallel=True, tied=True),
    "tp2 pp2 branches sequence apart": case(
        tp=2, pp=2, branches=APART, sequence_parallel=True, rows=1
    ),
    "tp2 dp2": case(tp=2),
    "tp2 dp2 sequence parameters": case(tp=2, sequence_parallel=True, shard=Shard.parameters),
    "pp2 dp2": case(pp=2),
    "pp2 dp2 parameters": case(pp=2, shard=Shard.parameters),
    "pp2 dp2 none tied": case(pp=2, shard=Shard.none, tied=True),
    "pp2 dp2 interleaved tied": case(**INTERLEAVED, tied=True, shard=Shard.parameters),
    "pp2 dp2 zero bubble tied": case(**ZERO_BUBBLE, tied=True, shard=Shard.parameters),
}
EIGHT: dict[str, Case] = {
    "tp2 pp2 dp2": case(tp=2, pp=2),
    "tp2 pp2 dp2 teacher": case(tp=2, pp=2, teacher=TEACHER, rows=1),
    "tp2 pp2 dp2 sequence tied": case(
        tp=2, pp=2, sequence_parallel=True, tied=True, shard=Shard.parameters, rows=1
    ),
}
ONE: dict[str, Case] = {
    "float32": case(precision=Precision.fp32, spiking=False),
}
LAYOUTS = {1: ONE, 2: TWO, 4: FOUR, 8: EIGHT}
CASES = {name: each for cases in LAYOUTS.values() for name, each in cases.items()}
QUICK = {
    "float32", "tp2 float32", "tp2", "tp2 sequence tied recomputed",
    "pp2 gpipe", "pp2 interleaved tied", "pp2 zero bubble virtual", "tp2 pp2 sequence tied",
    "dp2 none", "dp2 teacher", "dp2 parameters selective", "hsdp 2x2 parameters",
    "tp2 branches sequence", "pp2 branches", "dp2 branches parameters apart selective",
}  # fmt: skip
"""For `make check`: every axis, shard level, schedule and kind of recomputation, and a teacher."""
NAMES = [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES]
DOUBLE = [each for each in NAMES if CASES[str(each.values[0])].precision is Precision.fp64]
SINGLE = [each for each in NAMES if each not in DOUBLE and each.values != ("float32",)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The run of a layout by its name."""
    return runs_of(LAYOUTS, QUICK, tmp_path_factory)


def test_the_quick_layouts_are_of_every_kind() -> None:
    quick = [CASES[name].parallel for name in QUICK]
    assert {each.schedule for each in quick if each.pp > 1} == set(PipelineSchedule)
    assert {each.shard for each in quick if each.pp == each.tp == 1} == set(Shard)
    assert len(CASES) == sum(len(cases) for cases in LAYOUTS.values()), "names are unique"


@pytest.mark.parametrize("name", DOUBLE)
def test_equals_one_process(runs: Any, name: str) -> None:
    each = CASES[name]
    actual: Run = runs(name)
    assert_same_run(actual, expected_run(each.oracle()))
    limit = each.rule.clip_norm
    assert limit is not None
    assert max(actual.norms) > limit, "clipping must be active once"


@pytest.mark.parametrize("name", SINGLE)
def test_equals_one_process_in_float32(runs: Any, name: str) -> None:
    """Without spikes, whose counts a last bit can flip (`smoke_fp32` of the design)."""
    actual: Run = runs(name)
    expected: Run = runs("float32")
    assert_close(actual.losses, expected.losses, relative=FLOAT32_LOSS, name="losses")
    assert_close(actual.norms, expected.norms, relative=FLOAT32_NORM, name="norms")


@pytest.mark.parametrize("name", NAMES)
def test_spikes_are_counted_as_in_one_process(runs: Any, name: str) -> None:
    """Of all channels and tokens, once each: whatever is cut, recomputed or traced."""
    assert_same_spikes(runs(name), CASES[name])
