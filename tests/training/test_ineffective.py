"""Options that change nothing are named when a run begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from parallel.backend.cpu import CpuBackend
from tests.support.fake_ranks import fake_mesh
from tests.training.tiny_run import tiny_run
from training.config import RunConfig
from training.engine_setup import describe
from training.ineffective import ineffective_options


def config_with(**changes: Any) -> RunConfig:
    changes = {"model": {"mixers": "L S F L", "ffns": "d*4"}, **changes}
    return tiny_run(Path("data"), Path("run"), **changes)


TAUGHT = {"teacher": "somewhere"}
SGD = {"name": "sgd"}
DRAWN = (
    "model.sinks.init (bos) has no effect on sinks that are not loaded, which are drawn: "
    "launch.convert copies the embedding."
)
TIED = {"gate": "key_tied", "feature_map": "sigmoid"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"parallel": {"pp": 2, "tp": 2, "schedule": "gpipe", "vocab_multiple": 4}}, []),
        ({"parallel": {"pp": 2, "schedule": "zero_bubble", "shard": "gradients"}}, []),
        ({"parallel": {"pp": 2, "stage_layers": [1, 3]}}, []),
        ({"parallel": {"ep": 2}}, ["parallel.ep (2) has no effect for model.ffns d*4."]),
        (
            {"parallel": {"schedule": "gpipe", "stage_layers": [4]}},
            ["parallel.schedule (gpipe) has no effect for parallel.pp 1.",
             "parallel.stage_layers ([4]) has no effect for parallel.pp 1."],
        ),
        (
            {"parallel": {"vocab_multiple": 4}},
            ["parallel.vocab_multiple (4) has no effect for parallel.tp 1."],
        ),
        (
            {"parallel": {"pp": 2, "schedule": "zero_bubble", "shard": "parameters"}},
            ["parallel.shard (parameters) acts as gradients for parallel.schedule zero_bubble: its "
             "split backward needs parameters that stay gathered."],
        ),
        (
            {"distill": {"temperature": 3.0, "offload": True}},
            ["distill.temperature (3.0) has no effect without training.teacher.",
             "distill.offload (true) has no effect without training.teacher."],
        ),
        (
            {"training": TAUGHT, "distill": {"temperature": 3.0, "hidden": 1.0, "offload": True}},
            ["distill.temperature (3.0) has no effect for distill.kl 0."],
        ),
        ({"training": TAUGHT, "distill": {"temperature": 3.0, "kl": 1.0}}, []),
        (
            {"model": {"moe": {"top_k": 2, "balance": "none"}}},
            ["model.moe.top_k (2) has no effect for model.ffns d*2.",
             "model.moe.balance (none) has no effect for model.ffns d*2."],
        ),
        (
            {"model": {"ffns": "e*2", "moe": {"balance_coefficient": 0.1, "balance": "bias"}}},
            ["model.moe.balance_coefficient (0.1) has no effect for model.moe.balance bias."],
        ),
        (
            {"model": {"ffns": "e*2", "moe": {"bias_update_rate": 0.1, "top_k": 2}}},
            ["model.moe.bias_update_rate (0.1) has no effect for model.moe.balance row."],
        ),
        ({"model": {"ffns": "e*2", "moe": {"balance_coefficient": 0.1, "top_k": 2}}}, []),
        (
            {"model": {"branches": {"merge": "mean"}, "sinks": {"rope": "none"}}},
            ["model.branches.merge (mean) has no effect for model.mixers L S.",
             "model.sinks.rope (none) has no effect for model.sinks.num_tokens 0."],
        ),
        (
            {"model": {"mixers": "F S", "linear": {"norm_eps": 1e-5},
                       "sinks": {"num_tokens": 2, "through_linear": False}}},
            ["model.linear.norm_eps (1e-05) has no effect for model.mixers F S.",
             "model.sinks.through_linear (false) has no effect for model.mixers F S."],
        ),
        (
            {"model": {"mixers": "L L", "linear": {**TIED, "gate_low_rank_dim": 8},
                       "sinks": {"num_tokens": 2, "rope": "absolute"}}},
            ["model.linear.gate_low_rank_dim (8) has no effect for model.linear.gate key_tied.",
             "model.sinks.rope (absolute) has no effect for model.mixers L L."],
        ),
        (
            {"model": {"bos_token_id": 1, "sinks": {"num_tokens": 2, "init": "bos"}}},
            [DRAWN],
        ),
        (
            {"model": {"bos_token_id": 1, "sinks": {"num_tokens": 2, "init": "bos"}},
             "init": {"checkpoint": "somewhere", "new": ["sinks.*"]}},
            [DRAWN],
        ),
        (
            {"model": {"mixers": "L+S L+F", "branches": {"merge": "learned"}, "bos_token_id": 1,
                       "linear": {**TIED, "gate_offset": 1.0},
                       "sinks": {"num_tokens": 2, "init": "bos", "rope": "none",
                                 "through_linear": False}},
             "init": {"checkpoint": "somewhere"}},
            [],
        ),
        ({"optimizer": {"beta1": 0.8, "eps": 1e-6}}, []),
        ({"optimizer": {**SGD, "weight_decay": 0.2}}, []),
        (
            {"optimizer": {**SGD, "beta1": 0.8, "beta2": 0.9, "eps": 1e-6}},
            ["optimizer.beta1 (0.8) has no effect for optimizer.name sgd.",
             "optimizer.beta2 (0.9) has no effect for optimizer.name sgd.",
             "optimizer.eps (1e-06) has no effect for optimizer.name sgd."],
        ),
    ],
)  # fmt: skip
def test_options_that_change_nothing_are_named(
    changes: dict[str, Any], expected: list[str]
) -> None:
    assert ineffective_options(config_with(**changes)) == expected


def test_a_run_warns_of_options_that_change_nothing(caplog: pytest.LogCaptureFixture) -> None:
    config = config_with(parallel={"vocab_multiple": 4}, distill={"temperature": 3.0})
    with fake_mesh(config.parallel, rank=0, world_size=1) as mesh, caplog.at_level("WARNING"):
        describe(config, CpuBackend(), mesh)
    assert caplog.messages == [
        "parallel.vocab_multiple (4) has no effect for parallel.tp 1.",
        "distill.temperature (3.0) has no effect without training.teacher.",
    ]
