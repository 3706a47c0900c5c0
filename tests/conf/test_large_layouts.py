"""Every experiment composes with a layout for 512 ranks, passes its checks and is cut whole."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from tests.conf.test_experiments import EXPERIMENTS, FROM_CHECKPOINT, load
from tests.support.fake_ranks import fake_mesh
from training.config import RunConfig
from training.layout import check_layout, cut_stages
from training.layout_table import layout_lines
from training.stages import build_plan

NUM_RANKS = 512
SMALL = ("parallel.tp=4", "parallel.pp=4", "parallel.schedule=gpipe", "training.microbatch_rows=1")
"""Four KV heads and four layers; one row a step on each of 32 data-parallel ranks."""
QUICKSTART = ("parallel.tp=2", "parallel.pp=4", "training.microbatch_rows=1")
LAYOUTS: dict[str, tuple[str, ...]] = {
    "cpt_7b": ("parallel.tp=4", "parallel.pp=8", "parallel.schedule=interleaved",
               "parallel.sequence_parallel=true"),
    "cpt_76b": (),
    "spikingbrain_76b": (),
    "curriculum_tiny": (*SMALL, "parallel.dp_replicate=4", *(
        f"stages.cpt_{name}.global_batch_tokens=16_384" for name in ("8k", "32k", "128k"))),
    "quickstart_base": (*QUICKSTART, "stages.base.global_batch_tokens=65_536"),
    "quickstart_control": (*QUICKSTART, "stages.continue.global_batch_tokens=65_536"),
    "quickstart_continue": (*QUICKSTART, "stages.continue.global_batch_tokens=65_536",
                            "parallel.schedule=zero_bubble"),
    "quickstart_scratch": (*QUICKSTART, "stages.continue.global_batch_tokens=65_536",
                           "parallel.stage_layers=[2,1,1,0]"),
    "spikingbrain_nano_moe": (*QUICKSTART, "parallel.ep=4",
                              "stages.continue.global_batch_tokens=65_536"),
    "smoke": SMALL,
    "smoke_fp32": (*SMALL, "parallel.sequence_parallel=true"),
    "smoke_moe": (*SMALL, "parallel.sequence_parallel=true"),
}  # fmt: skip


def compose(name: str) -> RunConfig:
    model = ["model=quickstart_hybrid"] if name in FROM_CHECKPOINT else []
    return load(f"experiment={name}", *model, *LAYOUTS[name])


def test_no_experiment_is_left_out() -> None:
    assert sorted(LAYOUTS) == EXPERIMENTS


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_a_layout_for_512_ranks(name: str) -> None:
    config = compose(name)
    with fake_mesh(config.parallel, rank=NUM_RANKS - 1, world_size=NUM_RANKS) as mesh:
        assert mesh.pp_size * mesh.dp_size * mesh.tp_size == NUM_RANKS
        assert mesh.pp_size > 1
        assert mesh.tp_size > 1 or mesh.ep_size > 1
        check_layout(config, build_plan(config), dp_size=mesh.dp_size)
        stages = cut_stages(config)
        lines = list(layout_lines(config, mesh, kernels=("fla", "flash_attn")))
    assert [stage.pp_rank for stage in stages] == [
        index % config.parallel.pp for index in range(config.parallel.num_stages)
    ]
    assert stages[0].first_layer == 0
    assert stages[-1].end_layer == config.model.num_hidden_layers
    assert all(one.end_layer == other.first_layer for one, other in pairwise(stages))
    assert [stage.index for stage in stages if stage.has_embedding] == [0]
    assert [stage.index for stage in stages if stage.has_head] == [len(stages) - 1]
    assert f"512 ranks = pp {mesh.pp_size} x dp {mesh.dp_size} x tp {mesh.tp_size}" in lines[1]
    if mesh.ep_size > 1:
        each = config.model.moe.num_experts // mesh.ep_size
        assert f"experts over ep {mesh.ep_size} of dp, {each} a rank" in lines
    shares = [int(share) for line in lines for share in re.findall(r" (\d+)% ", line)]
    assert len(shares) == config.parallel.pp, "every experiment's memory is planned"
    assert sum(shares) == pytest.approx(100, abs=config.parallel.pp / 2)


def test_a_layout_that_does_not_fit_is_refused() -> None:
    """The checks of the test above can fail: 128k rows are too few for 1F1B on 16 dp ranks."""
    config = load("experiment=cpt_7b", "parallel.tp=4", "parallel.pp=8")
    with pytest.raises(ValueError, match=r"number of microbatches \(2\) must be at least"):
        check_layout(config, build_plan(config), dp_size=16)
