"""512 ranks in one process: places, groups and parameters of real sizes, on the `fake` backend."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace
from math import prod

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from models.config import ModelConfig
from models.layouts import parameter_layouts
from models.mixer_config import SinkConfig
from models.model import Model
from models.recomputation import NOTHING
from parallel.assembly import Blueprint, build_parts, own_parts
from parallel.axes import axis_sizes, expert_axis_sizes
from parallel.boxes import local_of
from parallel.config import ParallelConfig, PipelineSchedule, Precision, Shard
from parallel.mesh import Mesh, Place
from parallel.pipeline_cut import cut
from parallel.planned import Assignment, Job, Layout
from parallel.rank_memory import rank_memory
from parallel.rank_parameters import RankParameters
from tests.models.test_cost import SPIKINGBRAIN_7B, SPIKINGBRAIN_76B
from tests.support.fake_ranks import fake_mesh

NUM_RANKS = 512
Sizes = tuple[int, int, int, int]
PRODUCTS: dict[Sizes, ParallelConfig] = {
    (1, 1, 512, 1): ParallelConfig(),
    (1, 512, 1, 1): ParallelConfig(shard=Shard.none),
    (8, 1, 16, 4): ParallelConfig(pp=8, tp=4, sequence_parallel=True),
    (8, 4, 4, 4): ParallelConfig(pp=8, tp=4, dp_replicate=4),
    (4, 16, 8, 1): ParallelConfig(pp=4, dp_replicate=16, dp_shard=8),
    (16, 32, 1, 1): ParallelConfig(pp=16, shard=Shard.none, dp=32),
    (2, 2, 16, 8): ParallelConfig(pp=2, dp=32, dp_replicate=2, tp=8, shard=Shard.parameters),
    (64, 1, 1, 8): ParallelConfig(pp=64, tp=8),
}


def place_at(rank: int, sizes: Sizes) -> Place:
    """Digits of the rank's number, tp the fastest."""
    rank, tp = divmod(rank, sizes[3])
    rank, shard = divmod(rank, sizes[2])
    pp, replicate = divmod(rank, sizes[1])
    return Place(pp, replicate, shard, tp)


def ranks_with(sizes: Sizes, **fixed: int) -> list[int]:
    """All ranks whose places have these coordinates, in order."""
    places = {rank: place_at(rank, sizes) for rank in range(NUM_RANKS)}
    return [
        rank
        for rank, place in places.items()
        if all(getattr(place, axis) == value for axis, value in fixed.items())
    ]


def members(mesh: DeviceMesh, axis: str) -> list[int]:
    return sorted(dist.get_process_group_ranks(mesh.get_group(axis)))


def check_place(mesh: Mesh, sizes: Sizes) -> None:
    """This rank's coordinates and the ranks of each of its groups."""
    own = place_at(mesh.rank, sizes)
    assert (mesh.size, mesh.pp_size, mesh.tp_size) == (NUM_RANKS, sizes[0], sizes[3])
    assert (mesh.pp_rank, mesh.tp_rank) == (own.pp, own.tp)
    assert mesh.dp_size == sizes[1] * sizes[2]
    assert mesh.dp_rank == own.dp_replicate * sizes[2] + own.dp_shard
    assert (mesh.replicate_rank, mesh.shard_size) == (own.dp_replicate, sizes[2])
    here = {name: getattr(own, name) for name in ("pp", "dp_replicate", "dp_shard", "tp")}

    def along(axis: str) -> list[int]:
        return ranks_with(sizes, **{name: at for name, at in here.items() if name != axis})

    assert sorted(dist.get_process_group_ranks(mesh.tp_group)) == along("tp")
    assert sorted(dist.get_process_group_ranks(mesh.pp_group)) == along("pp")
    names = mesh.fsdp_mesh.mesh_dim_names
    assert names == (("dp_replicate", "dp_shard") if sizes[1] > 1 else ("dp_shard",))
    for axis in names:
        assert members(mesh.fsdp_mesh, axis) == along(axis)
    assert dist.get_group_rank(mesh.tp_group, mesh.rank) == own.tp
    assert dist.get_group_rank(mesh.pp_group, mesh.rank) == own.pp


def check_all_places(mesh: Mesh, sizes: Sizes) -> None:
    """What one rank knows of the others."""
    assert all(mesh.place_of(rank) == place_at(rank, sizes) for rank in range(NUM_RANKS))
    for pp in {0, sizes[0] - 1}:
        for tp in range(sizes[3]):
            assert mesh.ranks_at(pp=pp, tp=tp) == ranks_with(sizes, pp=pp, tp=tp)
    mine = mesh.ranks_at(pp=mesh.pp_rank, tp=mesh.tp_rank)
    assert mine[mesh.dp_rank] == mesh.rank


@pytest.mark.parametrize("sizes", PRODUCTS, ids=lambda sizes: "x".join(map(str, sizes)))
def test_places_and_groups_of_512_ranks(sizes: Sizes) -> None:
    assert prod(sizes) == NUM_RANKS
    assert axis_sizes(PRODUCTS[sizes], NUM_RANKS) == sizes
    for rank in some_ranks(seed=sum(sizes)):
        with fake_mesh(PRODUCTS[sizes], rank=rank, world_size=NUM_RANKS) as mesh:
            check_place(mesh, sizes)
            check_all_places(mesh, sizes)
            assert (mesh.ep_size, mesh.ep_rank) == (1, 0)
            assert mesh.expert_replicate_rank == mesh.replicate_rank
            assert mesh.expert_fsdp_mesh == mesh.fsdp_mesh


def some_ranks(seed: int) -> tuple[int, ...]:
    """The first, the last and a few between."""
    drawn = random.Random(seed).sample(range(1, NUM_RANKS - 1), 3)
    return 0, *drawn, NUM_RANKS - 1


EXPERTS: dict[tuple[int, ...], ParallelConfig] = {
    (4, 1, 16, 8, 1): ParallelConfig(pp=4, dp=128, ep=8, shard=Shard.parameters),
    (1, 1, 1, 512, 1): ParallelConfig(ep=512),
    (8, 4, 2, 2, 4): ParallelConfig(pp=8, tp=4, dp_replicate=4, ep=2),
    (16, 4, 1, 8, 1): ParallelConfig(pp=16, shard=Shard.none, ep=8),
    (4, 4, 1, 32, 1): ParallelConfig(pp=4, dp_replicate=16, dp_shard=8, ep=32),
}
"""Sizes of pp, the two parts of edp, ep and tp: inside a copy, without shards, over copies."""


@pytest.mark.parametrize("sizes", EXPERTS, ids=lambda sizes: "x".join(map(str, sizes)))
def test_experts_lie_over_the_innermost_part_of_all_data_parallel_ranks(
    sizes: tuple[int, ...],
) -> None:
    config, (_, copies, shards, ep, _) = EXPERTS[sizes], sizes
    axes = axis_sizes(config, NUM_RANKS)
    assert expert_axis_sizes(axes, ep) == sizes
    for rank in some_ranks(seed=sum(sizes)):
        own = place_at(rank, axes)
        data = ranks_with(axes, pp=own.pp, tp=own.tp)
        at = data.index(rank)
        same_experts = data[at % ep :: ep]
        with fake_mesh(config, rank=rank, world_size=NUM_RANKS) as mesh:
            check_place(mesh, axes)
            assert (mesh.ep_size, mesh.ep_rank) == (ep, at % ep)
            first = at // ep * ep
            assert dist.get_process_group_ranks(mesh.ep_group) == data[first : first + ep]
            assert sorted(mesh.expert_fsdp_mesh.mesh.flatten().tolist()) == same_experts
            first = same_experts.index(rank) // shards * shards
            shard_ranks = same_experts[first : first + shards]
            assert members(mesh.expert_fsdp_mesh, "edp_shard") == shard_ranks
            assert mesh.expert_replicate_rank == first // shards
            if copies > 1:
                others = same_experts[same_experts.index(rank) % shards :: shards]
                assert members(mesh.expert_fsdp_mesh, "edp_replicate") == others
            is_in_copy = {place_at(each, axes).dp_replicate for each in shard_ranks}
            assert len(is_in_copy) == 1, "experts are sharded inside one copy of the model"


Boxes = dict[str, set[tuple[tuple[int, ...], tuple[int, ...]]]]


def build(config: ModelConfig, parallel: ParallelConfig, mesh: Mesh) -> list[Model]:
    """A rank's parts on the meta device."""
    stages = cut(config, parallel, sequence_length=8192)
    blueprint = Blueprint(
        config=config, spiking=None, precision=Precision.bf16, kernels=None,
        recompute=NOTHING, loss_chunk_tokens=1024,
    )  # fmt: skip
    return build_parts(blueprint, own_parts(config, stages, mesh), (), parallel, mesh)


def boxes_of(config: ModelConfig, parallel: ParallelConfig, mesh: Mesh) -> tuple[Boxes, int]:
    """Offsets and shapes of a rank's parameters without padding, and how many numbers it holds."""
    parts = build(config, parallel, mesh)
    own = RankParameters.of(parts, parameter_layouts(config), mesh)
    boxes: Boxes = {}
    for name in own:
        box = own.box(name)
        assert box.local.device == torch.device("meta")
        boxes[name] = {(box.offsets, tuple(box.local.shape))} if box.local.numel() else set()
    return boxes, sum(parameter.numel() for part in parts for parameter in part.parameters())


def assert_tiled(boxes: Boxes, shapes: dict[str, tuple[int, ...]]) -> None:
    """Distinct boxes of each parameter lie side by side along one dim and cover it."""
    assert boxes.keys() == shapes.keys()
    for name, shape in shapes.items():
        found = sorted(boxes[name])
        dims = [d for d in range(len(shape)) if any(size[d] != shape[d] for _, size in found)]
        assert len(dims) <= 1, f"{name} is cut along {dims}"
        dim = dims[0] if dims else 0
        end = 0
        for offsets, size in found:
            assert offsets[dim] == end, f"{name}: {found}"
            end += size[dim]
        assert end == shape[dim], f"{name}: {found}"


def count(boxes: Boxes) -> int:
    return sum(prod(size) for found in boxes.values() for _, size in found)


@pytest.mark.parametrize(
    ("parallel", "padding"),
    [
        (ParallelConfig(tp=4, pp=8), 0),
        (
            ParallelConfig(
                tp=4, pp=8, sequence_parallel=True, vocab_multiple=1000,
                schedule=PipelineSchedule.interleaved,
            ),
            153_000 - 152_064,
        ),
    ],
    ids=["no padding", "padded, interleaved"],
)  # fmt: skip
def test_the_7b_on_tp4_x_pp8_holds_every_parameter_once(
    parallel: ParallelConfig, padding: int
) -> None:
    """Replication and padding removed, the ranks' parameters are those of the report."""
    shapes = {n: layout.global_shape for n, layout in parameter_layouts(SPIKINGBRAIN_7B).items()}
    boxes: Boxes = defaultdict(set)
    held = 0
    for rank in range(32):
        with fake_mesh(parallel, rank=rank, world_size=32) as mesh:
            found, numbers = boxes_of(SPIKINGBRAIN_7B, parallel, mesh)
        held += numbers
        for name, each in found.items():
            boxes[name] |= each
    assert_tiled(boxes, shapes)
    assert count(boxes) == 7_616_542_976
    table = parameter_layouts(SPIKINGBRAIN_7B)
    replicated = sum(prod(table[name].global_shape) for name in table if table[name].tp_dim is None)
    assert held == 7_616_542_976 + 3 * replicated + 2 * padding * SPIKINGBRAIN_7B.hidden_size


def test_512_ranks_share_out_the_last_stage_of_the_7b() -> None:
    """pp 8 x dp 16 x tp 4: the shards of one place are the rows of what that place held alone."""
    alone = ParallelConfig(tp=4, pp=8)
    with fake_mesh(alone, rank=31, world_size=32) as mesh:
        whole, _ = boxes_of(SPIKINGBRAIN_7B, alone, mesh)
    assert "head.weight" in whole
    parallel = ParallelConfig(tp=4, pp=8, dp_shard=16, shard=Shard.parameters)
    shards: Boxes = defaultdict(set)
    last = ranks_with((8, 1, 16, 4), pp=7, tp=3)
    assert len(last) == 16
    for rank in last:
        with fake_mesh(parallel, rank=rank, world_size=NUM_RANKS) as mesh:
            for name, each in boxes_of(SPIKINGBRAIN_7B, parallel, mesh)[0].items():
                assert not shards[name] & each, f"{name}: two ranks hold the same rows"
                shards[name] |= each
    assert shards.keys() == whole.keys()
    for name, ((offsets, size),) in ((name, tuple(found)) for name, found in whole.items()):
        end = offsets[0]
        for (first, *rest), shape in sorted(shards[name]):
            assert (first, tuple(rest), shape[1:]) == (end, offsets[1:], size[1:]), name
            end += shape[0]
        assert end == offsets[0] + size[0], name


def test_512_ranks_share_out_the_experts_of_the_76b() -> None:
    """pp 4 x dp 128, ep 8: two experts a rank, whose channels 16 ranks cut."""
    parallel = ParallelConfig(pp=4, dp=128, ep=8, shard=Shard.parameters)
    config = replace(SPIKINGBRAIN_7B, **{**SPIKINGBRAIN_76B, "sinks": SinkConfig()})
    last = ranks_with((4, 1, 128, 1), pp=3)
    name, moe = "blocks.27.ffn.experts.up_proj.weight", config.moe
    channels = config.expert_intermediate_size // 16
    for rank in {*last[:8], *last[3::8]}:
        with fake_mesh(parallel, rank=rank, world_size=NUM_RANKS) as mesh:
            found, _ = boxes_of(config, parallel, mesh)
        ((offsets, size),) = found[name]
        dp_rank = last.index(rank)
        assert size == (moe.num_experts // 8, channels, config.hidden_size)
        assert offsets == (2 * (dp_rank % 8), dp_rank // 8 * channels, 0)


def test_what_ranks_of_the_76b_hold_is_what_is_planned() -> None:
    """On 512 ranks of the report's layout, of every stage: parameters at rest, to the byte."""
    parallel = ParallelConfig(pp=4, dp=128, ep=8)
    config = replace(SPIKINGBRAIN_7B, **{**SPIKINGBRAIN_76B, "sinks": SinkConfig()})
    job = Job(model=config, precision=Precision.bf16, length=8192, rows=512, microbatch_rows=1)
    layout = Layout.of(parallel, NUM_RANKS)
    for rank in range(0, NUM_RANKS, 128):
        with fake_mesh(parallel, rank=rank, world_size=NUM_RANKS) as mesh:
            parts = build(config, parallel, mesh)
            shards = [local_of(each) for part in parts for each in part.parameters()]
        given = Assignment.of(job, layout)
        assert rank_memory(given, rank // 128).weights == sum(
            shard.untyped_storage().nbytes() for shard in shards
        )
