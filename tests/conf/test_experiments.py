"""Every experiment and model preset composes, and its model has the size its name promises."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch

from launch.compose import load_config
from launch.schema import CONF
from models.cost import parameter_count
from models.mixer_config import GateKind
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


def test_smoke_moe_is_smoke_with_branches_sinks_and_experts() -> None:
    config, smoke = load("experiment=smoke_moe"), load("experiment=smoke")
    model = config.model
    assert (model.mixers, model.ffns) == ("[L+S L+F]*2", "[d e]*2")
    assert model.linear.gate is GateKind.key_tied
    assert model.sinks.num_tokens == 8
    assert (model.moe.num_experts, model.moe.num_shared_experts, model.moe.top_k) == (4, 1, 1)
    assert model.expert_intermediate_size == 128
    assert (model.moe.balance_coefficient, model.moe.z_loss_coefficient) == (1e-2, 1e-3)
    own = {"mixers", "ffns", "linear", "sinks", "moe"}
    sizes = {field.name for field in fields(model)} - own
    assert all(getattr(model, name) == getattr(smoke.model, name) for name in sizes)
    for name in ("stages", "training", "spiking", "schedule", "optimizer", "data", "seed"):
        assert getattr(config, name) == getattr(smoke, name), name


def test_the_7b_preset_counts_what_the_report_gives() -> None:
    config = load("model=spikingbrain_7b")
    assert parameter_count(config.model) == 7_616_542_976


def test_conf_is_yaml_only() -> None:
    assert {path.suffix for path in Path(CONF).rglob("*") if path.is_file()} == {".yaml"}
