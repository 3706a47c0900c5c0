"""Every layout trains the same mixture of experts: as `test_layout_matrix`, with `[d e]*2`.

The oracle computes every expert on every token, in one process and one pass, in float64, with the
routers' losses added up by their definition.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from models.expert_config import Balance, ExpertConfig, RouterScore
from models.lesson import Goals
from models.mixer_config import BranchConfig, BranchMerge
from parallel.config import ParallelConfig, PipelineSchedule, Shard
from tests.parallel.engine_cases import STEPS, Case, Rule, RuleName, Run
from tests.parallel.engine_oracle import (
    GRADIENT,
    assert_same_run,
    assert_same_spikes,
    expected_run,
)
from tests.parallel.layout_runs import runs_of
from tests.support.closeness import assert_close

DROPLESS = ExpertConfig(
    num_experts=5, intermediate_size=12, balance_coefficient=0.5, z_loss_coefficient=0.05
)
CAPACITY = replace(DROPLESS, top_k=2, renormalise=True, capacity_factor=1.0, num_shared_experts=2)
PREVIOUS = replace(
    DROPLESS, top_k=2, balance=Balance.previous_step, score=RouterScore.sigmoid,
    num_shared_experts=0,
)  # fmt: skip
BIAS = replace(DROPLESS, balance=Balance.bias, bias_update_rate=0.02, score=RouterScore.sigmoid)

BRANCHES = BranchConfig(merge=BranchMerge.learned)


def case(moe: ExpertConfig, *, rows: int = 2, **axes: Any) -> Case:
    extra = {name: axes.pop(name) for name in list(axes) if name in Case.__dataclass_fields__}
    parallel = ParallelConfig(vocab_multiple=4, **axes)
    return Case(parallel=parallel, is_cuttable=True, microbatch_rows=rows, moe=moe, **extra)


ZERO_BUBBLE = {"pp": 2, "schedule": PipelineSchedule.zero_bubble}
ONE = {
    "one row": case(DROPLESS, rows=1),
    "dropless two rows": case(DROPLESS, rows=2),
    "dropless four rows": case(DROPLESS, rows=4),
    "capacity one row": case(CAPACITY, rows=1),
    "two rows": case(CAPACITY, rows=2),
    "capacity four rows": case(CAPACITY, rows=4),
    "four rows": case(PREVIOUS, rows=4),
    "three rows": case(BIAS, rows=3),
    "without spikes": case(CAPACITY, rows=1, spiking=False),
    "blocks recomputed": case(CAPACITY, recompute=True),
    "parts recomputed": case(CAPACITY, selective=True),
    "microbatch": case(replace(CAPACITY, balance=Balance.microbatch), rows=8),
}
TWO = {
    "tp2": case(DROPLESS, tp=2),
    "tp2 capacity": case(CAPACITY, tp=2),
    "tp2 previous": case(PREVIOUS, tp=2, rows=1),
    "tp2 bias": case(BIAS, tp=2),
    "tp2 through": case(CAPACITY, tp=2, through=True),
    "tp2 sequence ties": case(CAPACITY, tp=2, sequence_parallel=True, ties=True),
    "tp2 sequence": case(DROPLESS, tp=2, sequence_parallel=True),
    "tp2 sequence capacity": case(CAPACITY, tp=2, sequence_parallel=True, rows=1),
    "tp2 sequence previous recomputed": case(
        PREVIOUS, tp=2, sequence_parallel=True, recompute=True
    ),
    "tp2 sequence bias selective": case(BIAS, tp=2, sequence_parallel=True, selective=True),
    "pp2": case(DROPLESS, pp=2),
    "pp2 capacity": case(CAPACITY, pp=2, rows=1),
    "pp2 interleaved previous": case(PREVIOUS, pp=2, schedule=PipelineSchedule.interleaved),
    "pp2 zero bubble": case(DROPLESS, **ZERO_BUBBLE),
    "pp2 zero bubble capacity selective": case(CAPACITY, **ZERO_BUBBLE, selective=True),
    "pp2 teacher": case(PREVIOUS, pp=2, teacher=Goals(kl=0.5, hidden=0.25, temperature=2.0)),
    "tp2 sequence branches": case(
        CAPACITY, tp=2, sequence_parallel=True, branches=BRANCHES, selective=True
    ),
    "pp2 ties": case(DROPLESS, pp=2, ties=True),
    "pp2 bias": case(BIAS, pp=2),
    "dp2": case(DROPLESS),
    "dp2 capacity sgd": case(CAPACITY, rule=Rule(RuleName.sgd)),
    "dp2 parameters": case(DROPLESS, shard=Shard.parameters, rows=1),
    "dp2 parameters previous selective": case(PREVIOUS, shard=Shard.parameters, selective=True),
    "dp2 parameters bias": case(BIAS, shard=Shard.parameters),
    "dp2 parameters capacity": case(CAPACITY, shard=Shard.parameters),
    "dp2 none": case(DROPLESS, shard=Shard.none, rows=1),
    "dp2 none capacity": case(CAPACITY, shard=Shard.none),
    "dp2 none bias": case(BIAS, shard=Shard.none),
}
FOUR = {
    "tp2 pp2 sequence capacity branches": case(
        CAPACITY, tp=2, pp=2, sequence_parallel=True, branches=BRANCHES, rows=1
    ),
    "pp2 dp2 parameters tied branches": case(
        DROPLESS, pp=2, shard=Shard.parameters, tied=True, branches=BRANCHES
    ),
    "tp2 pp2 sequence capacity": case(CAPACITY, tp=2, pp=2, sequence_parallel=True),
    "tp2 dp2 parameters previous": case(PREVIOUS, tp=2, shard=Shard.parameters),
    "pp2 dp2 bias": case(BIAS, pp=2),
    "hsdp 2x2 parameters": case(DROPLESS, dp_replicate=2, shard=Shard.parameters),
}
LAYOUTS: dict[int, dict[str, Case]] = {1: ONE, 2: TWO, 4: FOUR}
CASES = {name: each for cases in LAYOUTS.values() for name, each in cases.items()}
QUICK = {
    "one row", "dropless four rows", "capacity one row", "capacity four rows", "four rows",
    "three rows", "microbatch", "tp2 capacity", "tp2 sequence previous recomputed",
    "tp2 sequence bias selective", "tp2 sequence ties", "pp2 capacity", "dp2 none bias",
    "dp2 parameters previous selective",
}  # fmt: skip
NAMES = [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The run of a layout by its name."""
    return runs_of(LAYOUTS, QUICK, tmp_path_factory)


@pytest.mark.parametrize("name", NAMES)
def test_equals_dense_experts_in_one_process(runs: Any, name: str) -> None:
    assert_same_run(runs(name), expected_run(CASES[name].oracle()))


@pytest.mark.parametrize("name", NAMES)
def test_spikes_are_counted_as_in_one_process(runs: Any, name: str) -> None:
    each = CASES[name]
    actual: Run = runs(name)
    assert_same_spikes(actual, each)
    assert not each.spiking or any("expert_out" in metric for metric in actual.statistics)


@pytest.mark.parametrize("name", NAMES)
def test_routing_is_recorded_as_in_one_process(runs: Any, name: str) -> None:
    """Entropy, dropped share, largest logit: as one process records them."""
    each = CASES[name]
    actual: Run = runs(name)
    alike = [n for n in ONE if CASES[n].oracle() == each.oracle() and CASES[n].spiking]
    expected: Run = runs(alike[0] if alike else name)
    for found, wanted in zip(actual.routing, expected.routing, strict=True):
        assert found.keys() == wanted.keys()
        for metric, value in wanted.items():
            assert_close(found[metric], value, relative=GRADIENT, name=metric)


def test_the_cases_show_what_they_should(runs: Any) -> None:
    """Tokens are dropped, experts are left out, states move, and losses weigh in."""
    run: Run = runs("tp2 capacity")
    assert all(step["moe/1/dropped_share"] > 0 for step in run.routing)
    assert any(step["moe/3/load_min"] < 0.1 for step in run.routing)
    assert 0.01 < run.routing[0]["moe/balance_loss"] < 3
    assert 0.01 < run.routing[0]["moe/z_loss"] < 3
    bias = runs("dp2 none bias").parameters["blocks.1.ffn.router.selection_bias"]
    assert 0 < float(bias.abs().max()) <= STEPS * 0.02 + 1e-9
    load = runs("four rows").parameters["blocks.3.ffn.router.previous_load"]
    assert float(load.sum()) == pytest.approx(1.0, abs=1e-12)
    assert float(load.max()) > 1 / 5
