"""`model=from_checkpoint`: a model that a folder describes, with the keys that are given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from launch.compose import compose_mapping, typed
from launch.config_errors import ConfigError
from launch.convert import convert
from launch.convert_config import ConvertConfig
from launch.model_source import model_from_checkpoint, model_from_source
from models.config import ModelConfig
from models.conversion.source_config import read_config
from models.expert_config import ExpertConfig, RouterScore
from tests.models.conversion.tiny_sources import SIZES
from training.config import RunConfig

RAW = {"model_type": "llama", "rms_norm_eps": 0.125, "rope_theta": 500.0, **SIZES}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder whose config.json alone is read."""
    save_file({"unread": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(RAW))
    return tmp_path


def to_convert(source: Path, *overrides: str) -> ModelConfig | None:
    arguments = [f"source={source}", "out=b", *overrides]
    raw = compose_mapping("convert", ConvertConfig, arguments)
    return typed(raw, ConvertConfig, model_from_source).model


def test_a_conversion_changes_what_is_given_of_the_sources_model(source: Path) -> None:
    model = to_convert(
        source, "model=from_checkpoint", "model.ffns=d e e", "model.moe.num_experts=3",
        "model.moe.score=sigmoid", "model.window_tokens=null",
    )  # fmt: skip
    assert model is not None
    base = read_config(RAW)
    assert (model.rms_norm_eps, model.rope) == (0.125, base.rope)
    assert model.hidden_size == base.hidden_size
    assert model.ffns == "d e e"
    assert model.moe == ExpertConfig(num_experts=3, score=RouterScore.sigmoid)


def test_a_conversion_to_a_preset_reads_no_source(source: Path) -> None:
    named = to_convert(source / "nowhere", "model=spikingbrain_7b", "model.rms_norm_eps=0.5")
    assert named is not None
    assert (named.hidden_size, named.rms_norm_eps) == (3584, 0.5)
    assert to_convert(source / "nowhere") is None


@pytest.mark.parametrize("name", ["manifest.json", "checkpoints/step_00000001/manifest.json"])
def test_a_checkpoint_of_ours_is_told_how_to_become_a_source(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=r"got a Synfire checkpoint.*launch\.export checkpoint="):
        convert(ConvertConfig(source=str(tmp_path), out=str(tmp_path / "out")))


def test_options_without_a_model_say_how_to_get_one(source: Path) -> None:
    with pytest.raises(ConfigError, match=r"num_experts must come with model=NAME: .*from_check"):
        to_convert(source, "model.moe.num_experts=3")
    with pytest.raises(ConfigError, match=r"exact, measured or paper\. Did you mean exact\?"):
        to_convert(source, "upcycle.mode=exactly")


@pytest.mark.parametrize("command", ["train", "plan"])
def test_a_run_keeps_what_is_given_beside_the_checkpoints_model(
    command: str, monkeypatch: pytest.MonkeyPatch, source: Path
) -> None:
    base = {"rms_norm_eps": 0.125, "moe": {"num_experts": 3, "balance": "row"}, "linear": {}}
    monkeypatch.setattr("launch.model_source.checkpoint_model", lambda path: {**base, "at": path})
    overrides = [
        "model=from_checkpoint", "model.moe.balance=bias", f"init.checkpoint={source}",
        "model.linear.gate_floor=0.5",
    ]  # fmt: skip
    found = model_from_checkpoint(compose_mapping(command, RunConfig, overrides))["model"]
    assert found == {
        "rms_norm_eps": 0.125,
        "moe": {"num_experts": 3, "balance": "bias"},
        "linear": {"gate_floor": 0.5},
        "at": str(source),
    }
    preset = compose_mapping(command, RunConfig, ["model=smoke", f"init.checkpoint={source}"])
    assert model_from_checkpoint(preset) == preset
