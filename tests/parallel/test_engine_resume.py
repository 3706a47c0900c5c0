"""A saved engine goes on as if nothing had happened, and loads at any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.expert_config import Balance, ExpertConfig
from parallel.backend.cpu import CpuBackend
from parallel.boxes import Box
from parallel.checkpoint import load, read_manifest, read_tensors, save, tensor_shapes
from parallel.config import ParallelConfig, Precision, Shard
from parallel.engine import TorchEngine
from parallel.mesh import Mesh, close, init
from tests.parallel.engine_cases import (
    LEVELS,
    ROWS,
    Case,
    Rule,
    RuleName,
    Run,
    build_engine,
    gather,
    rows_of,
    share_of,
    train,
)
from tests.support.closeness import assert_close
from tests.support.distributed import run_ranks

SAVED_AT, NUM_STEPS = 2, 4
CASES = {
    "fp64": Case(parallel=LEVELS[Shard.gradients]),
    "fp32": Case(parallel=LEVELS[Shard.parameters], precision=Precision.fp32, microbatch_rows=2),
    "bf16": Case(parallel=LEVELS[Shard.gradients], precision=Precision.bf16, microbatch_rows=2),
    "none": Case(parallel=LEVELS[Shard.none]),
    "bias": Case(
        parallel=LEVELS[Shard.gradients],
        is_cuttable=True,
        moe=ExpertConfig(num_experts=5, balance=Balance.bias, bias_update_rate=0.05),
    ),
    "previous step": Case(
        parallel=LEVELS[Shard.parameters],
        is_cuttable=True,
        microbatch_rows=2,
        moe=ExpertConfig(num_experts=5, balance=Balance.previous_step, capacity_factor=1.5),
    ),
    "bf16 experts": Case(
        parallel=LEVELS[Shard.gradients],
        is_cuttable=True,
        precision=Precision.bf16,
        microbatch_rows=2,
        moe=ExpertConfig(num_experts=5, balance=Balance.previous_step, top_k=2),
    ),
    "sgd": Case(rule=Rule(RuleName.sgd), frozen=True),
}


def state_of(engine: TorchEngine) -> dict[str, Box]:
    return {
        **{f"model/{name}": box for name, box in engine.parameters.items()},
        **{f"optimizer/{name}": box for name, box in engine.optimizer_state().items()},
    }


def restored(mesh: Mesh, case: Case, folder: Path) -> TorchEngine:
    engine = build_engine(mesh, case, seed=None)
    load(folder, state_of(engine), mesh=mesh)
    engine.num_updates = read_manifest(folder)["num_updates"]
    return engine


def save_and_go_on(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    results = {}
    for name, case in CASES.items():
        mesh = init(CpuBackend(), case.parallel)
        uninterrupted = train(build_engine(mesh, case), case, last=NUM_STEPS)
        engine = build_engine(mesh, case)
        first = train(engine, case, last=SAVED_AT)
        save(folder / name, state_of(engine), {"num_updates": engine.num_updates}, mesh=mesh)
        saved = gather(mesh, state_of(engine))
        again = restored(mesh, case, folder / name)
        assert_equal(gather(mesh, state_of(again)), saved, name)
        second = train(again, case, first=SAVED_AT, last=NUM_STEPS)
        assert first.losses + second.losses == uninterrupted.losses, name
        assert first.norms + second.norms == uninterrupted.norms, name
        assert_equal(second.parameters, uninterrupted.parameters, name)
        results[name] = (saved, uninterrupted)
    return results


def load_elsewhere(rank: int, world_size: int, folder: Path) -> dict[str, tuple[Any, Run]]:
    results = {}
    for name, case in CASES.items():
        mesh = init(CpuBackend(), case.parallel)
        engine = restored(mesh, case, folder / name)
        results[name] = (
            gather(mesh, state_of(engine)),
            train(engine, case, first=SAVED_AT, last=NUM_STEPS),
        )
    return results


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], name: str) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key], value), f"{name}: {key}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("saved")
    return folder, run_ranks(save_and_go_on, 2, folder, tmp_path=folder)[0]


def test_resumed_at_the_same_layout_is_bitwise_equal(saved: tuple[Path, dict[str, Any]]) -> None:
    """The comparison is made on the ranks themselves; here only that all of it happened."""
    assert list(saved[1]) == list(CASES)


@pytest.mark.parametrize("world_size", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_other_numbers_of_ranks_load_the_same_bits(
    saved: tuple[Path, dict[str, Any]], world_size: int, tmp_path: Path
) -> None:
    folder, expected = saved
    results = run_ranks(load_elsewhere, world_size, folder, tmp_path=tmp_path)
    for rank_results in results:
        for name, (tensors, run) in rank_results.items():
            assert_equal(tensors, expected[name][0], name)
            if CASES[name].precision is Precision.fp64:
                losses = expected[name][1].losses[SAVED_AT:NUM_STEPS]
                assert_close(run.losses, losses, relative=1e-10, name=f"{name} losses")


def test_what_a_checkpoint_holds(saved: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = saved
    keys = tensor_shapes(folder / "fp64")
    parameters = {key.removeprefix("model/") for key in keys if key.startswith("model/")}
    for moment in ("exp_avg", "exp_avg_sq"):
        assert {f"optimizer/{moment}/{name}" for name in parameters} < set(keys)
    assert len(keys) == 3 * len(parameters)
    assert not [key for key in tensor_shapes(folder / "sgd") if key.startswith("optimizer/")]
    assert {tensor.dtype for _, tensor in read_tensors(folder / "bf16")} == {torch.float32}
    assert {tensor.dtype for _, tensor in read_tensors(folder / "fp64")} == {torch.float64}


@pytest.mark.parametrize(
    ("case", "name", "first"),
    [("bias", "selection_bias", 0.0), ("previous step", "previous_load", 0.2)],
)
def test_what_routers_remember_is_in_the_checkpoint(
    saved: tuple[Path, dict[str, Any]], case: str, name: str, first: float
) -> None:
    """It has moved by then, and has no optimizer state."""
    tensors = saved[1][case][0]
    for layer in (1, 3):
        state = f"blocks.{layer}.ffn.router.{name}"
        assert tensors[f"model/{state}"].shape == (5,)
        assert float((tensors[f"model/{state}"] - first).abs().max()) > 1e-3
        assert not [key for key in tensors if key.startswith("optimizer/") and key.endswith(state)]


def test_weights_written_after_an_evaluation_are_used() -> None:
    """Gathered copies of parameters must not outlive the pass that gathered them."""
    mesh = init(CpuBackend(), ParallelConfig(), environment={})
    try:
        case = Case()
        engine = build_engine(mesh, case)
        (rows,) = share_of(rows_of(0), 0, 1, ROWS)
        shard = engine.parameters["final_norm.weight"].local
        before = engine.token_losses(rows)
        assert engine.parameters["final_norm.weight"].local.data_ptr() == shard.data_ptr()
        shard.mul_(2.0)
        assert not torch.equal(engine.token_losses(rows), before)
    finally:
        close(mesh)
