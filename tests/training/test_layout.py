"""What a layout asks of a run, refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.training.tiny_run import tiny_run
from training.config import RunConfig
from training.layout import check_layout
from training.stages import build_plan

FOUR_LAYERS = {"mixers": "L S F L", "ffns": "d*4"}
SIX_EXPERTS = {"num_experts": 6}


def config_with(**changes: Any) -> RunConfig:
    """Four rows of 16 tokens, then four of 32; 4 query and 2 KV heads, 24 FFN channels."""
    changes = {"model": FOUR_LAYERS, "training": {"microbatch_rows": 1}, **changes}
    return tiny_run(Path("data"), Path("run"), **changes)


def check(config: RunConfig, *, dp_size: int = 1) -> None:
    check_layout(config, build_plan(config), dp_size=dp_size)


REFUSED: list[tuple[dict[str, Any], int, str]] = [
    (
        {"parallel": {"tp": 4}}, 1,
        r"parallel\.tp \(4\) must divide model\.num_key_value_heads: got 2\. The largest valid tp "
        r"below it is 2; use parallel\.pp or parallel\.dp for more ranks\.",
    ),
    ({"parallel": {"tp": 3}}, 1, r"tp \(3\) must divide model\.num_attention_heads: got 4\."),
    (
        {"parallel": {"tp": 2}, "model": {**FOUR_LAYERS, "intermediate_size": 25}}, 1,
        r"parallel\.tp \(2\) must divide model\.intermediate_size: got 25\. The largest valid tp "
        r"below it is 1;",
    ),
    (
        {"parallel": {"ep": 4}, "model": {**FOUR_LAYERS, "ffns": "d*3 e", "moe": SIX_EXPERTS}}, 4,
        r"parallel\.ep \(4\) must divide model\.moe\.num_experts: got 6\. Set it to 3 or 6, or",
    ),
    (
        {
            "parallel": {"tp": 2, "sequence_parallel": True},
            "stages": {
                "odd": {"sequence_length": 15, "steps": 3, "global_batch_tokens": 60, "lr": 1e-2}
            },
        }, 1,
        r"stages\.odd\.sequence_length \(15\) must be a multiple of parallel\.tp with "
        r"sequence_parallel: got 2\. Set it to 14 or 16, or parallel\.sequence_parallel=false\.",
    ),
    (
        {"parallel": {"pp": 8}}, 1,
        r"parallel\.pp \(8\) must give at most one stage a layer: got pp 8 x 1 stages for 4 layers",
    ),
    (
        {"parallel": {"pp": 2, "stage_layers": [1, 2]}}, 1,
        r"parallel\.stage_layers \(\[1, 2\]\) must sum to the layers of the model: got 3 for 4",
    ),
    (
        {}, 3,
        r"stages\.short\.global_batch_tokens \(64: 4 rows of 16\) must be a multiple of dp x "
        r"microbatch_rows rows: got dp 3 x 1\. Set it to 48 or 96, or parallel\.dp to a divisor",
    ),
    (
        {"parallel": {"pp": 2}}, 4,
        r"number of microbatches \(1\) must be at least the number of stages for parallel\.schedule"
        r" one_f_one_b: got pp 2 x 1 stages\. The nearest valid is 2: change training\.micro",
    ),
    (
        {"parallel": {"pp": 2, "schedule": "zero_bubble"}, "training": {"recompute": "full"}}, 1,
        r"training\.recompute \(full\) must be none or selective for parallel\.schedule "
        r"zero_bubble: its split backward",
    ),
    (
        {
            "parallel": {"pp": 2}, "training":
            {"microbatch_rows": 1, "recompute": "full", "recompute_stages": [2]},
        }, 1,
        r"training\.recompute_stages \(\[2\]\) must be pipeline stages from 0 to 1: parallel\.pp",
    ),
    (
        {"training": {"recompute": "full", "recompute_stages": [-1]}}, 1,
        r"training\.recompute_stages \(\[-1\]\) must be pipeline stages from 0 to 0: parallel\.pp",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "dp_size", "message"), REFUSED)
def test_a_layout_that_cannot_run_is_refused(
    changes: dict[str, Any], dp_size: int, message: str
) -> None:
    config = config_with(**changes)
    with pytest.raises(ValueError, match=message):
        check(config, dp_size=dp_size)


@pytest.mark.parametrize(
    ("changes", "dp_size"),
    [
        ({}, 4),
        ({"parallel": {"tp": 2, "sequence_parallel": True}}, 2),
        ({"parallel": {"pp": 4}}, 1),
        ({"parallel": {"pp": 2, "schedule": "interleaved"}}, 2),
        ({"parallel": {"pp": 2, "schedule": "gpipe"}}, 4),
        ({"parallel": {"pp": 2, "schedule": "zero_bubble"}}, 1),
        ({"parallel": {"pp": 2}, "training": {"recompute": "full", "recompute_stages": [1]}}, 1),
    ],
)
def test_a_layout_that_fits_passes(changes: dict[str, Any], dp_size: int) -> None:
    """The nearest neighbours of what is refused above: nothing is raised."""
    check(config_with(**changes), dp_size=dp_size)
