"""Every experiment and model preset composes, and its model has the size its name promises."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch

from launch.compose import load_config
from launch.schema import CONF
from models.cost import active_parameter_count, parameter_count
from models.layer_pattern import FfnKind, MixerKind
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


def test_the_76b_preset_counts_what_the_report_gives() -> None:
    config = load("model=spikingbrain_76b").model
    assert parameter_count(config) == 76_055_286_272
    assert active_parameter_count(config) / 1e9 == pytest.approx(11.89, abs=0.005)
    full = [i for i, kinds in enumerate(config.layers.mixers) if MixerKind.full in kinds]
    dense = [i for i, kind in enumerate(config.layers.ffns) if kind is FfnKind.dense]
    # Counted from 1 as in the report's figure 3.
    assert [layer + 1 for layer in full] == [7, 14, 21, 28]
    assert [layer + 1 for layer in dense] == [1, 2, 3, 5, 7, 9, 11]
    assert all(MixerKind.linear in kinds for kinds in config.layers.mixers)


def test_the_76b_is_trained_on_as_many_tokens_at_each_length_as_the_7b() -> None:
    tokens = [
        {name: stage.steps * stage.global_batch_tokens for name, stage in config.stages.items()}
        for config in (load("experiment=cpt_7b"), load("experiment=cpt_76b"))
    ]
    assert tokens[0] == pytest.approx(tokens[1], rel=2e-3)


def test_conf_is_yaml_only() -> None:
    assert {path.suffix for path in Path(CONF).rglob("*") if path.is_file()} == {".yaml"}
