"""What each level shares out, and in which dtype parameters act."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.expert_config import Balance, ExpertConfig
from models.mixer_config import BranchConfig, BranchMerge, BranchNorm
from parallel.backend.cpu import CpuBackend
from parallel.config import ParallelConfig, Precision, Shard
from parallel.engine import TorchEngine
from parallel.fully_sharded import shard_dim
from parallel.mesh import Mesh, close, init
from tests.parallel.engine_cases import LEVELS, ROWS, Case, build_engine, train_step
from tests.support.closeness import assert_close
from tests.support.distributed import run_ranks


def dtypes_inside_forward(engine: TorchEngine, case: Case) -> dict[str, torch.dtype]:
    """Dtype of every parameter as its module sees it while it runs."""
    seen: dict[str, torch.dtype] = {}

    def look(name: str, module: nn.Module) -> None:
        for leaf, parameter in module.named_parameters(recurse=False):
            assert not isinstance(parameter, DTensor), f"{name}.{leaf} is not gathered"
            seen[f"{name}.{leaf}"] = parameter.dtype

    handles = [
        # Registered last, so that it runs after FSDP has gathered and cast.
        module.register_forward_pre_hook(lambda m, _, name=name: look(name, m))
        for name, module in engine.parts[0].named_modules()
        if any(True for _ in module.parameters(recurse=False))
    ]
    train_step(engine, case, 0)
    for handle in handles:
        handle.remove()
    return seen


class Collectives(TorchDispatchMode):
    """Counts what FSDP asks of the process group, and divisions of a whole unit's gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[func._opname] += 1
        if func._opname == "div" and args[0].ndim == 1 and not isinstance(args[1], Tensor):
            self.counts["div"] += 1
        return func(*args, **(kwargs or {}))


def collectives_of(mesh: Mesh, case: Case) -> Counter[str]:
    engine = build_engine(mesh, case)
    with Collectives() as collectives:
        train_step(engine, case, 0)
    return collectives.counts


def step_and_look(engine: TorchEngine, case: Case) -> tuple[float, bool]:
    """Loss of a step, and whether block 0 is still gathered when block 1 starts."""
    gathered: list[bool] = []

    def look(*_: Any) -> None:
        weight = engine.parts[0].get_parameter("blocks.0.ffn.up_proj.weight")
        gathered.append(not isinstance(weight, DTensor))

    handle = engine.parts[0].get_submodule("blocks.1").register_forward_pre_hook(look)
    loss = train_step(engine, case, 0)
    handle.remove()
    return loss, gathered[0]


def look_at_levels(rank: int, world_size: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for shard in Shard:
        mesh = init(CpuBackend(), ParallelConfig(shard=shard))
        case = Case(
            parallel=LEVELS[shard],
            recompute=shard is Shard.parameters,
            precision=Precision.bf16,
        )
        engine = build_engine(mesh, case)
        results[f"{shard.name} dtypes"] = dtypes_inside_forward(engine, case)
        results[f"{shard.name} at rest"] = {
            (box.local.dtype, engine.gradients()[name].local.dtype)
            for name, box in engine.parameters.items()
        }
        results[f"{shard.name} rows"] = engine.parameters["embedding.weight"].local.shape[0]
        results[f"{shard.name} loss"], results[f"{shard.name} gathered after forward"] = (
            step_and_look(engine, case)
        )
        results[f"{shard.name} collectives"] = [
            collectives_of(mesh, Case(parallel=LEVELS[shard], microbatch_rows=rows))
            for rows in (ROWS // 2, ROWS // 4)
        ]
        experts = Case(
            parallel=LEVELS[shard],
            is_cuttable=True,
            precision=Precision.bf16,
            moe=ExpertConfig(num_experts=4, balance=Balance.bias),
        )
        engine = build_engine(mesh, experts)
        results[f"{shard.name} expert dtypes"] = dtypes_inside_forward(engine, experts)
        wide = Case(parallel=LEVELS[shard], precision=Precision.fp32)
        branches = replace(case, is_cuttable=True, branches=BRANCHES)
        mesh = init(CpuBackend(), case.parallel)
        found = dtypes_inside_forward(build_engine(mesh, branches), branches)
        results[f"{shard.name} dtypes of branches"] = found
        results[f"{shard.name} fp32 loss"] = train_step(build_engine(mesh, wide), wide, 0)
    return results


@pytest.fixture(scope="module")
def levels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("levels")
    result: dict[str, Any] = run_ranks(look_at_levels, 2, tmp_path=folder)[0]
    return result


def test_gradients_are_reduced_once_a_step(levels: dict[str, Any]) -> None:
    """However many microbatches; with sharded parameters every microbatch gives them up."""
    units = 3
    one, two = levels["none collectives"]
    assert (one["allreduce_"], two["allreduce_"]) == (units, units)
    assert not one["_allgather_base_"] + one["_reduce_scatter_base_"]
    one, two = levels["gradients collectives"]
    assert (one["_reduce_scatter_base_"], two["_reduce_scatter_base_"]) == (units, units)
    assert (one["_allgather_base_"], two["_allgather_base_"]) == (units, units)
    one, two = levels["parameters collectives"]
    assert (one["_reduce_scatter_base_"], two["_reduce_scatter_base_"]) == (units, 2 * units)
    # Forward and backward of each block, and once of the root, which stays gathered in between.
    assert (one["_allgather_base_"], two["_allgather_base_"]) == (2 * units - 1, 4 * units - 2)


def test_one_process_pays_for_no_mean() -> None:
    mesh = init(CpuBackend(), ParallelConfig(), environment={})
    try:
        assert not collectives_of(mesh, Case())
    finally:
        close(mesh)


FLOAT32 = ("norm.weight", "gate_down.weight", "gate_up.weight", "gate_up.bias", "merge.weight")
BRANCHES = BranchConfig(norm=BranchNorm.after_output, merge=BranchMerge.learned)


@pytest.mark.parametrize("shard", [shard.name for shard in Shard])
def test_norms_and_gates_act_in_float32(levels: dict[str, Any], shard: str) -> None:
    seen: dict[str, torch.dtype] = levels[f"{shard} dtypes"]
    assert {
        "final_norm.weight",
        "blocks.0.mixer.gate_up.bias",
        "blocks.1.mixer.q_norm.weight",
    } < set(seen)
    for name, dtype in seen.items():
        expected = torch.float32 if name.endswith(FLOAT32) else torch.bfloat16
        assert dtype == expected, name


@pytest.mark.parametrize("shard", [shard.name for shard in Shard])
def test_norms_and_weights_of_branches_act_in_float32(levels: dict[str, Any], shard: str) -> None:
    seen: dict[str, torch.dtype] = levels[f"{shard} dtypes of branches"]
    float32 = {name for name, dtype in seen.items() if dtype is torch.float32}
    assert {"blocks.0.mixer.merge.weight", "blocks.1.mixer.full.output_norm.weight"} < float32
    assert float32 == {name for name in seen if name.endswith(FLOAT32)}
    assert set(seen.values()) == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize("shard", [shard.name for shard in Shard])
def test_routers_act_in_float32(levels: dict[str, Any], shard: str) -> None:
    seen: dict[str, torch.dtype] = levels[f"{shard} expert dtypes"]
    experts = {name: dtype for name, dtype in seen.items() if name.startswith("blocks.1.ffn.")}
    assert len(experts) == 8
    for name, dtype in experts.items():
        assert dtype == (torch.float32 if ".router." in name else torch.bfloat16), name


@pytest.mark.parametrize("shard", [shard.name for shard in Shard])
def test_masters_and_gradients_are_float32(levels: dict[str, Any], shard: str) -> None:
    assert levels[f"{shard} at rest"] == {(torch.float32, torch.float32)}


@pytest.mark.parametrize(
    ("shape", "num_shards", "dim"),
    [
        ((4, 12, 24), 2, 0),
        ((3, 12, 24), 2, 1),
        ((2, 1408, 3584), 16, 1),
        ((3, 9, 24), 2, 0),
        ((6, 24, 9), 4, 1),
        ((5, 24), 4, 0),
        ((7,), 4, 0),
    ],
)
def test_matrices_that_ranks_cannot_share_out_are_cut_themselves(
    shape: tuple[int, ...], num_shards: int, dim: int
) -> None:
    assert shard_dim(shape, num_shards) == dim


def test_rows_at_rest_and_after_forward(levels: dict[str, Any]) -> None:
    assert [levels[f"{s.name} rows"] for s in Shard] == [61, 31, 31]
    assert [levels[f"{s.name} gathered after forward"] for s in Shard] == [True, True, False]


@pytest.mark.parametrize("shard", [shard.name for shard in Shard])
def test_bfloat16_is_near_float32(levels: dict[str, Any], shard: str) -> None:
    assert_close(levels[f"{shard} loss"], levels[f"{shard} fp32 loss"], relative=0.05)
