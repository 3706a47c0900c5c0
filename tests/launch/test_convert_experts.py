"""`launch.convert` with experts: what is upcycled, what trains afterwards."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from launch.compose import compose_mapping, load_config, typed
from launch.convert import convert, target_model
from launch.convert_config import ConvertConfig, UpcycleConfig
from launch.model_source import model_from_checkpoint
from models.config import ModelConfig
from models.conversion.huggingface import read_json
from models.conversion.new_parameters import UpcycleMode
from models.conversion.source_config import read_config
from models.expert_config import ExpertConfig
from parallel.checkpoint import read_tensors, verify
from tests.launch.converting import VOCABULARY, config, hybrid, source, text
from tests.models.conversion.test_huggingface import same_bits
from tests.models.exported.folders import case
from training.config import RunConfig
from training.run import run
from training.weight_source import open_weights

pytest.importorskip("transformers")
__all__ = ["source", "text"]


def test_other_mixers_leave_the_sources_experts() -> None:
    base = case("softmax experts")
    for mixers, ffns in (("L+S L S F", base.ffns), ("L*3", "d*3")):
        assert target_model(ConvertConfig(source="a", out="b", mixers=mixers), base).ffns == ffns


EXPERTS = ExpertConfig(num_experts=4, num_shared_experts=2)


def with_experts(source: Path, out: Path, **changes: Any) -> ConvertConfig:
    """Linear and windowed layers, two of them with experts."""
    model = dataclasses.replace(
        read_config(read_json(source / "config.json")), moe=EXPERTS, window_tokens=8
    )
    return hybrid(source, out, **{"model": model, "ffns": "d d e e", **changes})


@pytest.mark.parametrize("mode", list(UpcycleMode))
def test_upcycling_writes_copies_that_train(
    source: Path, text: Path, tmp_path: Path, mode: UpcycleMode, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="launch.convert")
    std = None if mode is UpcycleMode.exact else 0.3
    options = UpcycleConfig(mode=mode, router_std=std)
    found = convert(with_experts(source, tmp_path / "out", text=str(text), upcycle=options))
    verify(tmp_path / "out")
    assert found["unexplained_tensors"] == found["source"]["unused_tensors"] == []
    assert found["options"]["upcycle"] == mode.value
    ratios = found["numeric"]["expert_layers"]
    assert [entry["layer"] for entry in ratios] == [2, 3]
    near = {UpcycleMode.exact: 1e-6, UpcycleMode.measured: 0.05, UpcycleMode.paper: 0.2}[mode]
    assert all(abs(entry["output_ratio_mean"] - 1) < near for entry in ratios)
    assert "layer 3: experts put out" in caplog.text
    written = {name.removeprefix("model/"): value for name, value in read_tensors(tmp_path / "out")}
    opened = open_weights(tmp_path / "out")
    assert opened.model.layers.describe() == "mixers [L S]*2 | ffns d*2 e*2"
    assert {name for name in opened.new_parameters if ".ffn." in name} == {
        "blocks.2.ffn.router.weight", "blocks.3.ffn.router.weight",
    }  # fmt: skip
    experts = written["blocks.3.ffn.experts.down_proj.weight"]
    shared = written["blocks.3.ffn.shared.down_proj.weight"]
    assert all(same_bits(part, experts[0]) for part in (*experts, *shared.chunk(2, dim=1)))
    first_loss = train_one_step(tmp_path, text)
    assert first_loss == pytest.approx(found["numeric"]["loss"]["target"], rel=0.2)


def train_one_step(folder: Path, text: Path) -> float:
    """The loss of one step of `launch.train` from the checkpoint in `folder / "out"`."""
    run_dir = folder / "run"
    overrides = [
        "experiment=smoke", "model=from_checkpoint", f"init.checkpoint={folder / 'out'}",
        f"data.path={text}", "backend=cpu", f"run_dir={run_dir}", "training.max_steps=1",
        "training.precision=fp32", "spiking=off",
    ]  # fmt: skip
    mapping = compose_mapping("train", RunConfig, overrides)
    run(typed(mapping, RunConfig, model_from_checkpoint))
    (row,) = (json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines())
    return float(row["loss"])


def test_branches_sinks_and_experts_of_a_preset_train(
    source: Path, text: Path, tmp_path: Path
) -> None:
    """The quickstart's second target at the source's sizes, from conversion to a step."""
    preset = load_config("convert", ConvertConfig, [
        f"source={source}", f"out={tmp_path / 'out'}", "model=spikingbrain_nano_moe",
        f"model.vocab_size={VOCABULARY}", "model.hidden_size=32", "model.intermediate_size=48",
        "model.head_dim=8", "model.tie_word_embeddings=false", "model.bos_token_id=1",
        "model.sinks.init=bos", f"text={text}", "text_tokens=256", "sequence_length=64",
    ])  # fmt: skip
    found = convert(preset)
    assert found["target"]["pattern"] == "mixers L+S*3 L+F | ffns [d e]*2"
    assert found["unexplained_tensors"] == found["source"]["unused_tensors"] == []
    assert [entry["layer"] for entry in found["numeric"]["linear_layers"]] == [0, 1, 2, 3]
    for entry in found["numeric"]["expert_layers"]:
        assert entry["output_ratio_mean"] == pytest.approx(1, abs=1e-6)
    numbers = found["numeric"]["perplexity"]
    assert numbers["target"] < 2 * numbers["source"]
    loss = train_one_step(tmp_path, text)
    assert loss == pytest.approx(found["numeric"]["loss"]["target"], rel=0.2)


def test_ffns_are_kept_where_only_mixers_change(source: Path, tmp_path: Path) -> None:
    target = target_model(with_experts(source, tmp_path, ffns=None), ModelConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, mixers="F*4", ffns="d*4",
    ))  # fmt: skip
    assert (target.mixers, target.ffns) == ("[L S]*2", "d*4")
    named = dataclasses.replace(target, ffns="e d e d")
    assert target_model(hybrid(source, tmp_path, model=named), target).ffns == "e d e d"
    assert target_model(config(source, tmp_path, ffns="d e d d"), target).ffns == "d e d d"
