"""Every experiment and model preset composes, and its model has the size its name promises."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from launch.compose import load_config
from launch.schema import CONF
from models.cost import active_parameter_count, parameter_count
from models.layer_pattern import FfnKind, MixerKind
from models.mixer_config import BranchConfig, BranchProjections
from models.model import Model
from training.config import RunConfig

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
MODELS = sorted({path.stem for path in (CONF / "model").glob("*.yaml")} - {"from_checkpoint"})


def load(*overrides: str) -> RunConfig:
    return load_config("train", RunConfig, list(overrides))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_builds_and_counts(name: str) -> None:
    model = [] if name not in FROM_CHECKPOINT else ["model=quickstart_hybrid"]
    config = load(f"experiment={name}", *model)
    assert config.experiment == name
    assert config.total_steps > 0
    with torch.device("meta"):
        built = Model(config.model)
    shared = {id(p): p.numel() for p in built.parameters()}
    assert sum(shared.values()) == parameter_count(config.model)


FROM_CHECKPOINT = {"quickstart_control", "quickstart_continue"}
"""Experiments whose model is the one of init.checkpoint."""


@pytest.mark.parametrize("name", MODELS)
def test_every_model_preset_is_complete(name: str) -> None:
    config = load(f"model={name}")
    assert config.model.num_hidden_layers == len(config.model.layers.ffns)


def test_smoke_has_the_sizes_that_scripts_rely_on() -> None:
    config = load("experiment=smoke")
    stage = config.stages["main"]
    assert (stage.rows_per_step, stage.sequence_length, stage.steps) == (32, 128, 20)
    assert config.model.num_attention_heads == 8
    assert config.model.num_key_value_heads == 4
    assert config.model.vocab_size == 2048
    assert config.model.mixers == "[L S]*2"
    assert config.seed == 1
    assert config.data.corpus.max_bytes == 2_000_000


def test_the_7b_preset_counts_what_the_report_gives() -> None:
    config = load("model=spikingbrain_7b")
    assert parameter_count(config.model) == 7_616_542_976


def test_the_76b_preset_counts_what_the_report_gives() -> None:
    model = load("model=spikingbrain_76b").model
    assert round(parameter_count(model) / 1e9, 2) == 76.06
    assert round(active_parameter_count(model) / 1e9, 2) == 11.89
    separate = BranchConfig(projections=BranchProjections.separate)
    model = dataclasses.replace(model, branches=separate)
    assert round(parameter_count(model) / 1e9, 2) == 76.88
    assert round(active_parameter_count(model) / 1e9, 2) == 12.72
    full = [n for n, kinds in enumerate(model.layers.mixers, start=1) if MixerKind.full in kinds]
    assert full == [7, 14, 21, 28]
    dense = [n for n, ffn in enumerate(model.layers.ffns, start=1) if ffn is FfnKind.dense]
    assert dense == [1, 2, 3, 5, 7, 9, 11]


def test_conf_is_yaml_only() -> None:
    assert {path.suffix for path in Path(CONF).rglob("*") if path.is_file()} == {".yaml"}
