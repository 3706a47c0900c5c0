"""Experts cut over ranks: what is refused, what each rank holds, what travels, extreme loads."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.config import ModelConfig
from models.expert_config import Balance, ExpertConfig
from models.layouts import parameter_layouts
from models.recomputation import NOTHING
from parallel import row_routes
from parallel.assembly import Blueprint, build_parts, own_parts
from parallel.backend.cpu import CpuBackend
from parallel.collective_count import CollectiveCount
from parallel.config import ParallelConfig, Precision, Shard
from parallel.engine import TorchEngine
from parallel.experts import check_expert_parallel
from parallel.mesh import close, init
from parallel.pipeline_cut import cut
from parallel.rank_parameters import RankParameters
from tests.models.tiny import tiny_config
from tests.parallel.engine_cases import Case, Rows, Run, build_engine, rows_of, share_of, train
from tests.parallel.engine_oracle import LOSS, assert_same_run
from tests.parallel.test_expert_layouts import case
from tests.support.closeness import assert_close
from tests.support.distributed import run_ranks
from tests.support.fake_ranks import fake_mesh

FOUR = ExpertConfig(num_experts=4, intermediate_size=12, top_k=2)


@pytest.mark.parametrize(
    ("num_experts", "ep", "message"),
    [
        (6, 4, "parallel.ep (4) must divide model.moe.num_experts: got 6. Set it to 3 or 6, or"),
        (2, 4, "got 2. Set it to 2, or change model.moe.num_experts."),
        (5, 2, "got 5. Set it to 1 or 5, or"),
    ],
)
def test_an_ep_that_does_not_divide_the_experts_is_refused(
    num_experts: int, ep: int, message: str
) -> None:
    config = tiny_config(mixers="F F", ffns="d e", moe=ExpertConfig(num_experts=num_experts))
    with pytest.raises(ValueError, match=re.escape(message)):
        check_expert_parallel(config, ep)


def test_an_ep_that_divides_them_is_taken() -> None:
    moe = ExpertConfig(num_experts=6)
    for ep in (1, 2, 3, 6):
        check_expert_parallel(tiny_config(mixers="F F", ffns="d e", moe=moe), ep)
    check_expert_parallel(tiny_config(mixers="F F", ffns="d d", moe=moe), 4)


def held(config: ModelConfig, parallel: ParallelConfig, num_ranks: int) -> dict[str, Tensor]:
    """How many ranks count each value of each parameter, those that only hold it left out."""
    counts = {
        name: torch.zeros(layout.global_shape) for name, layout in parameter_layouts(config).items()
    }
    blueprint = Blueprint(
        config=config, spiking=None, precision=Precision.bf16, kernels=None,
        recompute=NOTHING, loss_chunk_tokens=16,
    )  # fmt: skip
    stages = cut(config, parallel, sequence_length=16)
    for rank in range(num_ranks):
        with fake_mesh(parallel, rank=rank, world_size=num_ranks) as mesh:
            parts = build_parts(blueprint, own_parts(config, stages, mesh), (), parallel, mesh)
            own = RankParameters.of(parts, parameter_layouts(config), mesh)
            counted = own.shares().counted
            for name in own:
                counts[name][own.box(name).slices] += name in counted
    return counts


@pytest.mark.parametrize(
    ("parallel", "num_ranks", "moe"),
    [
        (ParallelConfig(ep=2), 4, FOUR),
        (ParallelConfig(ep=4, shard=Shard.none), 8, FOUR),
        (ParallelConfig(ep=2, tp=2, pp=2), 16, FOUR),
        (ParallelConfig(ep=2, tp=2, dp_replicate=2), 16, FOUR),
        (ParallelConfig(ep=4, dp_replicate=4), 8, FOUR),
        # Three experts a rank: four shards cut rows of 12 and of 24 channels.
        (ParallelConfig(ep=2), 8, replace(FOUR, num_experts=6)),
        # Neither 3 nor 13 is a multiple of 4: the last shard of two matrices holds nothing.
        (ParallelConfig(ep=2), 8, replace(FOUR, num_experts=6, intermediate_size=13)),
        (ParallelConfig(dp=8), 8, replace(FOUR, num_experts=2)),
    ],
    ids=["dp", "none", "tp pp", "hsdp", "over copies", "along rows", "uneven", "without ep"],
)  # fmt: skip
def test_every_value_is_counted_by_one_rank(
    parallel: ParallelConfig, num_ranks: int, moe: ExpertConfig
) -> None:
    config = tiny_config(mixers="L F", ffns="d e", moe=moe)
    for name, counts in held(config, parallel, num_ranks).items():
        assert bool((counts == 1).all()), f"{name}: {counts.unique().tolist()}"


CROWDED = replace(FOUR, balance=Balance.bias)
RUNS: dict[str, Case] = {
    "crowded": case(replace(CROWDED, top_k=1), ep=2),
    "crowded capacity": case(replace(CROWDED, capacity_factor=1.0), ep=2),
    "crowded parameters recomputed": case(
        replace(CROWDED, top_k=1), ep=2, shard=Shard.parameters, recompute=True, rows=1
    ),
}
"""One expert, or the two of the first rank, are chosen by all tokens in all steps."""
PREFERENCE = torch.tensor([90.0, 60.0, 0.0, 0.0])


def crowd(engine: TorchEngine) -> None:
    """Let every router prefer the first rank's experts, whatever it reads."""
    for name, box in engine.parameters.items():
        if name.endswith("selection_bias"):
            box.fill(PREFERENCE)


def crowded_run(parallel: ParallelConfig, each: Case) -> Run:
    engine = build_engine(init(CpuBackend(), parallel), replace(each, parallel=parallel))
    crowd(engine)
    return train(engine, replace(each, parallel=parallel))


def measured(each: Case) -> tuple[Run, Counter[str]]:
    """A run and the bytes of its collectives."""
    engine = build_engine(init(CpuBackend(), each.parallel), each)
    with CollectiveCount() as count:
        run = train(engine, each, last=2)
    return run, count.bytes


SPIKING = case(FOUR, ep=2)


def on_two_ranks(rank: int, world_size: int) -> dict[str, Any]:
    results: dict[str, Any] = {
        name: crowded_run(each.parallel, each) for name, each in RUNS.items()
    }
    results["spikes"] = measured(SPIKING)
    results["continuous"] = measured(replace(SPIKING, spiking=False))
    row_routes.MAX_INTEGER = 0
    results["plain"] = measured(SPIKING)
    row_routes.MAX_INTEGER = 127
    for name, ep in (("bfloat16", 2), ("bfloat16 whole", 1)):
        wide = case(FOUR, ep=ep, precision=Precision.bf16, shard=Shard.parameters, spiking=False)
        results[name] = train(build_engine(init(CpuBackend(), wide.parallel), wide), wide, last=2)
    engine = build_engine(init(CpuBackend(), SPIKING.parallel), SPIKING)
    (rows,) = share_of(rows_of(0), rank, world_size, 4)
    results["token losses"] = engine.token_losses(rows)
    with pytest.raises(ValueError, match=r"rows \(\[4, 3\], one entry a rank\) must be the same"):
        engine.forward_backward([first(rows, 4 - rank)], num_targets=10)
    return results


def first(rows: Rows, count: int) -> Rows:
    return Rows(rows.tokens[:count], rows.labels[:count], rows.document_ids[:count])


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("experts")
    return run_ranks(on_two_ranks, 2, tmp_path=folder)


@pytest.mark.parametrize("name", RUNS)
def test_all_tokens_may_choose_one_expert_and_others_get_none(
    two_ranks: list[dict[str, Any]], name: str
) -> None:
    actual: Run = two_ranks[0][name]
    mesh = init(CpuBackend(), ParallelConfig(), environment={})
    try:
        engine = build_engine(mesh, RUNS[name].oracle())
        crowd(engine)
        expected = train(engine, RUNS[name].oracle())
    finally:
        close(mesh)
    assert all(step["moe/1/load_min"] == 0.0 for step in expected.routing)
    assert_same_run(actual, expected)


def test_spikes_that_travel_as_bytes_are_the_same_numbers(two_ranks: list[dict[str, Any]]) -> None:
    for result in two_ranks:
        (spikes, few), (plain, many) = result["spikes"], result["plain"]
        assert few["all-to-all"] < many["all-to-all"]
        assert spikes.losses == plain.losses
        assert spikes.norms == plain.norms
        for name, value in plain.parameters.items():
            assert torch.equal(spikes.parameters[name], value), name


def test_bfloat16_is_that_of_whole_experts(two_ranks: list[dict[str, Any]]) -> None:
    """Sums come in another order, so nearly."""
    actual, expected = two_ranks[0]["bfloat16"], two_ranks[0]["bfloat16 whole"]
    assert_close(actual.losses, expected.losses, relative=0.01, name="losses")
    assert_close(actual.norms[:1], expected.norms[:1], relative=0.05, name="norm")


def test_losses_of_tokens_are_those_of_one_process(two_ranks: list[dict[str, Any]]) -> None:
    mesh = init(CpuBackend(), ParallelConfig(), environment={})
    try:
        expected = build_engine(mesh, SPIKING.oracle()).token_losses(rows_of(0))
    finally:
        close(mesh)
    actual = torch.cat([result["token losses"] for result in two_ranks])
    assert_close(actual, expected, relative=LOSS)
