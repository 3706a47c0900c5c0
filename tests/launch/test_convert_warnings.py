"""What `launch.convert` says of options that have no effect, or a coarse one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from launch.compose import load_config
from launch.convert import convert, warn_of_new_parts
from launch.convert_config import ConvertConfig, UpcycleConfig
from models.conversion.huggingface import read_json
from models.conversion.new_parameters import UpcycleMode
from models.conversion.source_config import read_config
from models.expert_config import ExpertConfig, RouterScore
from models.mixer_config import FeatureMap, GateKind, LinearAttentionConfig
from tests.launch.converting import hybrid, source, text
from tests.models.tiny import tiny_config

pytest.importorskip("transformers")
__all__ = ["source", "text"]
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


def test_without_text_the_calibration_is_said_to_be_missing(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = convert(hybrid(source, tmp_path / "out"))
    assert "norm_init (calibrated) has no effect without sample text" in caplog.text
    assert found["tensors"]["blocks.0.mixer.head_norm.weight"]["note"] == "ones"


def test_a_half_life_without_gates_is_said_to_have_no_effect(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    linear = LinearAttentionConfig(feature_map=FeatureMap.sigmoid, gate=GateKind.key_tied)
    base = read_config(read_json(source / "config.json"))
    convert(hybrid(source, tmp_path / "out", model=dataclasses.replace(base, linear=linear),
                   gate_init=64))  # fmt: skip
    assert caplog.text.count("gate_init") == 1


def test_upcycling_without_experts_is_said_to_have_no_effect(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    convert(hybrid(source, tmp_path / "out", upcycle=UpcycleConfig(mode=UpcycleMode.paper)))
    assert "upcycle has no effect: no layer becomes e" in caplog.text


def test_what_only_new_linear_layers_read_is_said_to_have_no_effect(
    source: Path, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = load_config("convert", ConvertConfig, [
        f"source={source}", f"out={tmp_path / 'out'}", f"text={text}", "text_tokens=64",
        "sequence_length=32", "align.tokens=64", "gate_init=64", "certificate.numeric=false",
        "linear.key_bias=zero",
    ])  # fmt: skip
    convert(options)
    named = [m.split(" has no effect")[0] for m in caplog.messages if "no layer becomes L" in m]
    assert named == ["align.tokens", "gate_init", "linear.key_bias"]
