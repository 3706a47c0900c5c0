"""What `launch.convert` says of options that a gate or a router makes idle or coarse."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from launch.convert import warn_of_new_parts
from launch.convert_config import ConvertConfig, UpcycleConfig
from models.conversion.new_parameters import UpcycleMode
from models.expert_config import ExpertConfig, RouterScore
from models.mixer_config import FeatureMap, GateKind, LinearAttentionConfig
from tests.models.tiny import tiny_config

TIED = {"linear": LinearAttentionConfig(feature_map=FeatureMap.sigmoid, gate=GateKind.key_tied)}
SIGMOID = {"ffns": "d e d e", "moe": ExpertConfig(num_experts=4, score=RouterScore.sigmoid)}
RENORMALISED = {
    "ffns": "d e d e",
    "moe": ExpertConfig(num_experts=4, top_k=2, renormalise=True),
}
SOFTMAX = {"ffns": "d e d e", "moe": ExpertConfig(num_experts=4)}
PAPER = {"upcycle": UpcycleConfig(mode=UpcycleMode.paper)}


@pytest.mark.parametrize(
    ("options", "changes", "said"),
    [
        ({"gate_init": 64}, TIED, r"gate_init (64) has no effect with linear.gate key_tied"),
        ({"gate_init": 64}, {}, ""),
        ({}, TIED, ""),
        (PAPER, SIGMOID, "upcycle.mode (paper) expects weights of 1 / num_experts"),
        (PAPER, RENORMALISED, "upcycle.mode (paper) expects weights of 1 / num_experts"),
        (PAPER, SOFTMAX, ""),
        ({}, SIGMOID, ""),
    ],
)
def test_options_that_gate_or_router_make_idle_or_coarse(
    options: dict[str, Any], changes: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    base = dataclasses.replace(tiny_config(), mixers="F*4", ffns="d*4")
    config = ConvertConfig(source="a", out="b", **options)
    warn_of_new_parts(config, base, dataclasses.replace(base, **changes))
    assert [said in message for message in caplog.messages] == [True] * bool(said)
