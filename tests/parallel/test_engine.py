"""The engine under every data-parallel layout equals a plain model without one, in float64."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.expert_config import Balance, ExpertConfig
from parallel.backend.cpu import CpuBackend
from parallel.config import ParallelConfig, Shard
from parallel.engine import ParamGroup, TorchEngine
from parallel.mesh import close, init
from tests.parallel.engine_cases import (
    FROZEN_NORM,
    LEARNING_RATE,
    LEVELS,
    Case,
    Rule,
    RuleName,
    Run,
    build_engine,
    config_of,
    gather,
    rows_of,
    share_of,
    train,
    train_step,
)
from tests.parallel.engine_oracle import assert_same_run, expected_run
from tests.support.closeness import assert_close
from tests.support.distributed import run_ranks

CASES = {
    "gradients": Case(),
    "parameters": Case(parallel=LEVELS[Shard.parameters]),
    "none": Case(parallel=LEVELS[Shard.none]),
    "gradients-accumulated": Case(microbatch_rows=1),
    "parameters-accumulated": Case(parallel=LEVELS[Shard.parameters], microbatch_rows=1),
    "none-accumulated": Case(parallel=LEVELS[Shard.none], microbatch_rows=1),
    "gradients-recomputed": Case(recompute=True, microbatch_rows=1),
    "parameters-recomputed": Case(parallel=LEVELS[Shard.parameters], recompute=True),
    "tied": Case(parallel=LEVELS[Shard.parameters], tied=True),
    "sgd": Case(rule=Rule(RuleName.sgd)),
    "frozen": Case(frozen=True, microbatch_rows=1),
    "not-clipped": Case(rule=Rule(clip_norm=None), spiking=False),
}
FOUR = pytest.param(4, marks=pytest.mark.slow)


def every_case(rank: int, world_size: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        mesh = init(CpuBackend(), case.parallel)
        engine = build_engine(mesh, case)
        results[name] = train(engine, case) if rank == 0 else fingerprint(train(engine, case))
    return results


def fingerprint(run: Run) -> str:
    digest = hashlib.sha256(repr((run.losses, run.norms)).encode())
    for name in sorted(run.parameters):
        digest.update(run.parameters[name].numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @functools.cache
    def at(world_size: int) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp("engine")
        return run_ranks(every_case, world_size, tmp_path=folder)

    return at


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("world_size", [1, 2, FOUR])
def test_equals_one_plain_model(runs: Any, world_size: int, name: str) -> None:
    actual: Run = runs(world_size)[0][name]
    expected = expected_run(CASES[name].oracle())
    assert_same_run(actual, expected)
    limit = CASES[name].rule.clip_norm
    assert limit is None or max(actual.norms) > limit, "clipping must be active once"


@pytest.mark.parametrize("world_size", [2, FOUR])
def test_every_rank_holds_the_same_model(runs: Any, world_size: int) -> None:
    """Bitwise, also where each rank updates its own replica."""
    first, *others = runs(world_size)
    for name in CASES:
        assert {other[name] for other in others} == {fingerprint(first[name])}, name


def test_frozen_parameters_do_not_move(runs: Any) -> None:
    run: Run = runs(2)[0]["frozen"]
    reference: Run = runs(2)[0]["gradients"]
    start = oracle_start()
    for name in ("embedding.weight", FROZEN_NORM):
        assert torch.equal(run.parameters[name], start[name])
        assert not torch.equal(reference.parameters[name], start[name])
        assert name not in run.gradients


def oracle_start() -> dict[str, Tensor]:
    mesh = init(CpuBackend(), ParallelConfig(), environment={})
    try:
        return gather(mesh, build_engine(mesh, Case()).parameters)
    finally:
        close(mesh)


def evaluate_and_complain(rank: int, world_size: int) -> dict[str, Any]:
    """Everything else that two ranks do: evaluation between steps, errors, nothing changed."""
    mesh = init(CpuBackend(), ParallelConfig(shard=Shard.parameters))
    case = Case(parallel=LEVELS[Shard.parameters])
    engine = build_engine(mesh, case)
    (mine,) = share_of(rows_of(0), rank, world_size, 4)
    losses = engine.token_losses(mine)
    train_step(engine, case, 0)
    engine.clip_and_step(LEARNING_RATE)
    after = engine.token_losses(mine)
    assert not torch.equal(losses, after), "evaluation must see the update"
    before = fingerprint_of(engine)
    errors = [
        _error(lambda: engine.forward_backward([mine] * (rank + 1), num_targets=10)),
        _error(lambda: engine.forward_backward([mine], num_targets=10 + rank)),
        _error(lambda: engine.forward_backward([], num_targets=10)),
    ]
    train_step(engine, case, 1)
    dict(engine.parts[0].named_parameters())["blocks.1.ffn.up_proj.weight"].grad = None
    errors.append(_error(lambda: engine.clip_and_step(LEARNING_RATE)))
    train_step(engine, case, 1)
    if rank == 1:
        engine.gradients()["blocks.1.mixer.q_proj.weight"].local[0, 0] = torch.inf
    errors.append(_error(lambda: engine.clip_and_step(LEARNING_RATE)))
    assert fingerprint_of(engine) == before
    return {"losses": losses, "errors": errors, "poisoned": _poisoned_replica(rank)}


def _poisoned_replica(rank: int) -> str:
    """A loss that is NaN on one rank only."""
    mesh = init(CpuBackend(), ParallelConfig(shard=Shard.none))
    case = Case(parallel=LEVELS[Shard.none])
    engine = build_engine(mesh, case)
    if rank == 1:
        engine.parameters["final_norm.weight"].local.fill_(torch.nan)
    before = fingerprint_of(engine)
    message = _error(lambda: train_step(engine, case, 0))
    assert fingerprint_of(engine) == before
    assert engine.gradients() == {}
    return message


def fingerprint_of(engine: Any) -> str:
    digest = hashlib.sha256()
    for boxes in (engine.parameters, engine.optimizer_state()):
        for name in sorted(boxes):
            digest.update(boxes[name].local.numpy().tobytes())
    return digest.hexdigest() + str(engine.num_updates)


def _error(work: Any) -> str:
    with pytest.raises((ValueError, RuntimeError)) as caught:
        work()
    return str(caught.value)


def test_evaluation_and_errors(tmp_path: Path) -> None:
    results = run_ranks(evaluate_and_complain, 2, tmp_path=tmp_path)
    assert results[0]["errors"] == results[1]["errors"]
    microbatches, targets, empty, missing, infinite = results[0]["errors"]
    assert "microbatches ([1, 2], one entry a rank) must be the same on every rank" in microbatches
    assert "num_targets ([10, 11], one entry a rank) must be the same" in targets
    assert "microbatches (0) and num_targets (10) must be at least 1" in empty
    assert "blocks.1.ffn.up_proj.weight must have a gradient after backward: got none" in missing
    assert "gradient norm (nan) must be finite: rank 1 was the first to see it" in infinite
    assert "gradient of blocks.1.mixer.q_proj.weight" in infinite
    assert all(
        "loss (nan) must be finite: rank 1 was the first to see it" in result["poisoned"]
        for result in results
    )
    losses = torch.cat([result["losses"] for result in results])
    rows = rows_of(0)
    assert losses.shape == rows.tokens.shape
    assert torch.equal(losses == 0, rows.labels == -100)


def test_token_losses_sum_to_the_loss() -> None:
    mesh = init(CpuBackend(), ParallelConfig(), environment={})
    try:
        case = Case(spiking=False)
        engine = build_engine(mesh, case)
        rows = rows_of(0)
        losses = engine.token_losses(rows)
        loss = train_step(engine, case, 0)
        assert_close(float(losses.sum() / (rows.labels != -100).sum()), loss, relative=1e-12)
    finally:
        close(mesh)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("nothing.weight",), "must name parameters of the model: got nothing.weight"),
        (("head.weight", "head.weight"), "each parameter once: got head.weight twice"),
        # A state: it moves without an optimizer.
        (("blocks.1.ffn.router.selection_bias",), "parameters of the model: got blocks.1.ffn.rout"),
    ],
)
def test_groups_that_do_not_fit(names: tuple[str, ...], message: str) -> None:
    mesh = init(CpuBackend(), ParallelConfig(), environment={})
    try:
        config = config_of(Case(is_cuttable=True, moe=ExpertConfig(balance=Balance.bias)))
        with pytest.raises(ValueError, match=message):
            TorchEngine(config, mesh=mesh, groups=[ParamGroup(names, 0.0, 1.0)], rule=Rule())
    finally:
        close(mesh)


def test_frozen_parameters_have_no_optimizer_state() -> None:
    mesh = init(CpuBackend(), ParallelConfig(), environment={})
    try:
        engine = build_engine(mesh, Case(frozen=True))
        named = {name.partition("/")[2] for name in engine.optimizer_state()}
        assert set(engine.parameters) - named == {"embedding.weight", FROZEN_NORM}
    finally:
        close(mesh)


def test_without_a_seed_parameters_hold_nan() -> None:
    mesh = init(CpuBackend(), ParallelConfig(), environment={})
    try:
        engine = build_engine(mesh, Case(), seed=None)
        assert all(bool(box.local.isnan().all()) for box in engine.parameters.values())
    finally:
        close(mesh)
