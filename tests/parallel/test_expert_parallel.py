"""Experts cut over ranks train the same model: as `test_expert_layouts`, with `parallel.ep`.

The oracle computes every expert on every token, in one process and one pass, in float64.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from models.expert_config import Balance, ExpertConfig, RouterScore
from models.lesson import Goals
from parallel.backend.cpu import CpuBackend
from parallel.checkpoint import save
from parallel.config import PipelineSchedule, Shard
from parallel.mesh import init
from tests.parallel.engine_cases import (
    SEED,
    Case,
    Rule,
    RuleName,
    Run,
    build_engine,
    gather,
)
from tests.parallel.engine_oracle import (
    GRADIENT,
    LOSS,
    assert_same_run,
    assert_same_spikes,
    expected_run,
)
from tests.parallel.layout_runs import runs_of
from tests.parallel.test_elastic import Digests, Numbers, digests, resume, state_of, take_steps
from tests.parallel.test_expert_layouts import BRANCHES, case
from tests.support.closeness import assert_close
from tests.support.distributed import run_ranks

DROPLESS = ExpertConfig(
    num_experts=4, intermediate_size=12, balance_coefficient=0.5, z_loss_coefficient=0.05
)
CAPACITY = replace(DROPLESS, top_k=2, renormalise=True, capacity_factor=1.0, num_shared_experts=2)
PREVIOUS = replace(
    DROPLESS, num_experts=8, top_k=3, balance=Balance.previous_step, score=RouterScore.sigmoid,
    num_shared_experts=0,
)  # fmt: skip
BIAS = replace(DROPLESS, balance=Balance.bias, bias_update_rate=0.02, score=RouterScore.sigmoid)
SIX = replace(DROPLESS, num_experts=6)
"""Of which two ranks get three, that two ranks cannot share out: rows of each are cut."""
UNEVEN = replace(SIX, intermediate_size=9)
"""Rows of two of the three matrices neither."""

TWO = {
    "ep2": case(DROPLESS, ep=2),
    "ep2 capacity": case(CAPACITY, ep=2, rows=1),
    "ep2 previous selective": case(PREVIOUS, ep=2, selective=True),
    "ep2 bias none": case(BIAS, ep=2, shard=Shard.none),
    "ep2 parameters": case(CAPACITY, ep=2, shard=Shard.parameters),
    "ep2 recomputed": case(CAPACITY, ep=2, recompute=True),
    "ep2 parameters recomputed": case(
        PREVIOUS, ep=2, recompute=True, shard=Shard.parameters, rows=1
    ),
    "ep2 parameters selective": case(DROPLESS, ep=2, selective=True, shard=Shard.parameters),
    "ep2 continuous": case(DROPLESS, ep=2, spiking=False),
    "ep2 through": case(CAPACITY, ep=2, through=True),
    "ep2 tied sgd": case(DROPLESS, ep=2, tied=True, rule=Rule(RuleName.sgd)),
    "ep2 teacher": case(DROPLESS, ep=2, teacher=Goals(kl=0.5, hidden=0.25, temperature=2.0)),
}
FOUR = {
    "ep4": case(DROPLESS, ep=4),
    "ep4 capacity": case(CAPACITY, ep=4, rows=1),
    "ep4 branches selective": case(CAPACITY, ep=4, branches=BRANCHES, selective=True),
    "ep4 ties": case(PREVIOUS, ep=4, ties=True),
    "ep4 none previous": case(PREVIOUS, ep=4, shard=Shard.none),
    "ep4 over copies": case(BIAS, ep=4, dp_replicate=2),
    "ep2 tp2": case(DROPLESS, ep=2, tp=2),
    "ep2 tp2 sequence capacity": case(CAPACITY, ep=2, tp=2, sequence_parallel=True),
    "ep2 tp2 parameters recomputed": case(
        PREVIOUS, ep=2, tp=2, shard=Shard.parameters, recompute=True
    ),
    "ep2 pp2": case(DROPLESS, ep=2, pp=2),
    "ep2 pp2 interleaved capacity": case(
        CAPACITY, ep=2, pp=2, schedule=PipelineSchedule.interleaved
    ),
    "ep2 pp2 zero bubble": case(PREVIOUS, ep=2, pp=2, schedule=PipelineSchedule.zero_bubble),
    "ep2 pp2 gpipe recomputed": case(
        BIAS, ep=2, pp=2, schedule=PipelineSchedule.gpipe, recompute=True, shard=Shard.parameters
    ),
    "ep2 dp4": case(DROPLESS, ep=2),
    "ep2 dp4 none": case(CAPACITY, ep=2, shard=Shard.none),
    "ep2 dp4 parameters": case(PREVIOUS, ep=2, shard=Shard.parameters),
    "ep2 dp4 cut along rows": case(SIX, ep=2, shard=Shard.parameters),
    "ep2 dp4 uneven": case(UNEVEN, ep=2),
    "ep2 hsdp 2x2": case(CAPACITY, ep=2, dp_replicate=2),
    "ep2 hsdp 2x2 parameters": case(BIAS, ep=2, dp_replicate=2, shard=Shard.parameters),
}
EIGHT = {
    "ep2 tp2 pp2": case(DROPLESS, ep=2, tp=2, pp=2),
    "ep2 tp2 pp2 sequence capacity": case(
        CAPACITY, ep=2, tp=2, pp=2, sequence_parallel=True, shard=Shard.parameters
    ),
    "ep2 hsdp 2x4": case(SIX, ep=2, dp_replicate=2, shard=Shard.parameters, rows=1),
}
LAYOUTS: dict[int, dict[str, Case]] = {2: TWO, 4: FOUR, 8: EIGHT}
CASES = {name: each for cases in LAYOUTS.values() for name, each in cases.items()}
QUICK = {
    "ep2 capacity", "ep2 previous selective", "ep2 parameters recomputed", "ep2 bias none",
    "ep2 tp2 sequence capacity", "ep2 hsdp 2x2 parameters", "ep2 pp2",
}  # fmt: skip
NAMES = [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The run of a layout by its name."""
    return runs_of(LAYOUTS, QUICK, tmp_path_factory)


@pytest.mark.parametrize("name", NAMES)
def test_equals_one_process(runs: Any, name: str) -> None:
    assert_same_run(runs(name), expected_run(CASES[name].oracle()))


@pytest.mark.parametrize("name", NAMES)
def test_spikes_are_counted_as_in_one_process(runs: Any, name: str) -> None:
    """Inside of experts too, whose rows come from other ranks."""
    each = CASES[name]
    actual: Run = runs(name)
    assert_same_spikes(actual, each)
    assert not each.spiking or any("expert_out" in metric for metric in actual.statistics)


@dataclass(frozen=True)
class Visit:
    """What a layout found in a checkpoint, its next step, and what it saved then."""

    found: Digests
    numbers: Numbers
    saved: Digests


MOVED = {2: case(BIAS, ep=2), 1: case(BIAS), 4: case(BIAS, ep=4, shard=Shard.parameters)}
"""A layout for each number of ranks, in the order in which they continue each other's run."""
SIZES_IN_TURN = tuple(MOVED)


def visit(rank: int, world_size: int, folder: Path) -> Visit:
    """Load what the layout before has saved, take a step, save."""
    turn, each = SIZES_IN_TURN.index(world_size), MOVED[world_size]
    mesh = init(CpuBackend(), each.parallel)
    engine = build_engine(mesh, each, seed=None if turn else SEED)
    found: Digests = {}
    if turn:
        found = resume(folder / str(turn - 1), engine, mesh)
    numbers = take_steps(engine, each, turn, turn + 1)
    save(folder / str(turn), state_of(engine), {"num_updates": engine.num_updates}, mesh=mesh)
    return Visit(found, numbers, digests(gather(mesh, state_of(engine))))


def test_a_run_moves_from_ep_2_to_1_to_4(tmp_path: Path) -> None:
    """Parameters, moments and what routers remember keep their bits; the run is the oracle's."""
    visits = [run_ranks(visit, size, tmp_path, tmp_path=tmp_path)[0] for size in SIZES_IN_TURN]
    for before, after in itertools.pairwise(visits):
        assert after.found == before.saved
    keys = visits[0].saved.keys()
    assert {"model/blocks.1.ffn.experts.up_proj.weight", "model/blocks.1.ffn.router.selection_bias",
            "optimizer/exp_avg_sq/blocks.3.ffn.experts.down_proj.weight"} < keys  # fmt: skip
    expected = expected_run(MOVED[1].oracle())
    losses = [loss for each in visits for loss in each.numbers.losses]
    norms = [norm for each in visits for norm in each.numbers.norms]
    assert_close(losses, expected.losses[: len(visits)], relative=LOSS, name="losses")
    assert_close(norms, expected.norms[: len(visits)], relative=GRADIENT, name="norms")
