"""`launch.export`: Synfire checkpoints and Hugging Face folders to Hugging Face folders."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file

from launch.compose import load_config
from launch.config_errors import ConfigError
from launch.convert import convert
from launch.convert_config import ConvertConfig
from launch.export import ExportConfig, export
from models.config import ModelConfig, NeuronKind, SpikingConfig
from models.conversion.config_keys import Format
from models.conversion.huggingface import SafetensorsFolder
from models.conversion.source_config import read_config
from parallel.boxes import LazyTensor
from parallel.checkpoint import read_tensors, save_streamed
from tests.models.conversion import tiny_sources
from tests.models.conversion.test_export import random_entries
from tests.models.conversion.test_huggingface import same_bits
from tests.training.tiny_run import VOCAB_SIZE, prepare_data, rows_of, tiny_run
from training.config import RunConfig
from training.resolved_config import plain
from training.run import run
from training.weight_source import open_weights

pytest.importorskip("transformers")


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    files = [load_file(file) for file in folder.glob("*.safetensors")]
    return {name: value for values in files for name, value in values.items()}


def options(checkpoint: Path, out: Path, *more: str) -> ExportConfig:
    return load_config("export", ExportConfig, [f"checkpoint={checkpoint}", f"out={out}", *more])


@pytest.mark.parametrize("case", ["qwen2", "qwen2-tied", "qwen3", "llama", "mistral-full"])
def test_import_and_export_is_bitwise_in_the_bases_format(case: str, tmp_path: Path) -> None:
    """mistral-full would also fit the Llama format: the checkpoint remembers its base."""
    folder = tiny_sources.save(case, tmp_path / "hf", dtype=torch.bfloat16)
    (folder / "tokenizer.json").write_text("{}")
    convert(ConvertConfig(source=str(folder), out=str(tmp_path / "checkpoint")))
    format = export(options(tmp_path / "checkpoint", tmp_path / "out"))
    assert format.value == case.partition("-")[0]
    before, after = read_all(folder), read_all(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(same_bits(after[name], before[name]) for name in before)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    configs = [read_config(SafetensorsFolder(f).config) for f in (folder, tmp_path / "out")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("converted", [True, False], ids=["converted", "hugging face"])
def test_training_does_not_forget_the_bases_format(converted: bool, tmp_path: Path) -> None:
    """A Mistral without windows has the shapes of a Llama."""
    data = prepare_data(tmp_path)
    start = tiny_sources.save("mistral-full", tmp_path / "hf", vocab_size=VOCAB_SIZE)
    if converted:
        convert(ConvertConfig(source=str(start), out=str(tmp_path / "checkpoint")))
        start = tmp_path / "checkpoint"
    model = TypeAdapter(ModelConfig).dump_python(open_weights(start).model, mode="json")
    for steps in (1, 2):  # the second time from the run's own manifest
        config = tiny_run(data, tmp_path / "run", init={"checkpoint": str(start)},
                          training={"max_steps": steps}, spiking={"neuron": "off"})  # fmt: skip
        run(TypeAdapter(RunConfig).validate_python({**plain(config), "model": model}))
    assert export(options(tmp_path / "run", tmp_path / "out")) is Format.mistral


def test_hybrid_goes_to_the_public_format_and_back(tmp_path: Path) -> None:
    folder = tiny_sources.save("qwen2", tmp_path / "hf", dtype=torch.bfloat16)
    hybrid: dict[str, Any] = {"mixers": "L S L", "window_tokens": 8}
    convert(ConvertConfig(source=str(folder), out=str(tmp_path / "a"), **hybrid))
    more = ("max_shard_bytes=9000", "format=gla_swa")
    assert export(options(tmp_path / "a", tmp_path / "out", *more)) is Format.gla_swa
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    convert(ConvertConfig(source=str(tmp_path / "out"), out=str(tmp_path / "b")))
    first, second = (dict(read_tensors(tmp_path / name)) for name in ("a", "b"))
    assert first.keys() == second.keys()
    assert all(same_bits(first[name], second[name]) for name in first)
    manifests = [json.loads((tmp_path / n / "manifest.json").read_text()) for n in ("a", "b")]
    assert manifests[0]["model"] == manifests[1]["model"]


EVERYTHING = {
    "mixers": "L+S F", "ffns": "d e",
    "branches": {"merge": "learned", "projections": "separate"},
    "moe": {"num_experts": 4, "top_k": 2, "balance": "bias", "intermediate_size": 12},
    "sinks": {"num_tokens": 2},
}  # fmt: skip


def test_any_other_model_goes_to_our_format_and_trains_on(tmp_path: Path) -> None:
    data = prepare_data(tmp_path)
    run(tiny_run(data, tmp_path / "run", model=EVERYTHING, training={"max_steps": 4}))
    assert export(options(tmp_path / "run", tmp_path / "out")) is Format.synfire
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["spiking"] == {"k": 4.5, "blend": 1.0, "max_count": None}
    assert (tmp_path / "out" / "tokenizer.model").is_file()
    sample = {"text": str(data), "sequence_length": 32, "text_tokens": 128}
    certificate = convert(
        ConvertConfig(source=str(tmp_path / "out"), out=str(tmp_path / "back"), **sample)
    )
    assert certificate["numeric"]["logit_kl"] == 0.0
    assert set(certificate["origins"].values()) == {0, len(certificate["tensors"])}
    before, after = (open_weights(tmp_path / name) for name in ("run", "back"))
    assert before.model == after.model
    assert before.shapes == after.shapes
    names = list(before.shapes)
    for (name, first), (_, second) in zip(before.read(names), after.read(names), strict=True):
        assert same_bits(first, second), name
    assert after.manifest is not None
    assert after.manifest["spiking"]["k"] == 4.5
    for start in ("run", "out", "back"):
        how = {"init": {"checkpoint": str(tmp_path / start)}, "training": {"max_steps": 2}}
        run(tiny_run(data, tmp_path / f"from_{start}", model=EVERYTHING, **how))
    rows = [rows_of(tmp_path / f"from_{start}") for start in ("run", "out", "back")]
    assert rows[0] == rows[1] == rows[2]
    assert export(options(tmp_path / "from_out", tmp_path / "again")) is Format.synfire
    assert json.loads((tmp_path / "again" / "config.json").read_text())["spiking"] is None


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (1, r"the exported model does not spike: training had not come to start_step \(2\)"),
        (4, r"the exported model spikes \(adaptive, k = 4.5, blend = 1\); spiking=None leaves"),
    ],
)
def test_whether_the_exported_model_spikes_is_said(
    steps: int, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    config = ModelConfig(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, mixers="L F", ffns="d d",
    )  # fmt: skip
    spiking = SpikingConfig(neuron=NeuronKind.adaptive, start_step=2, k_start=6.0, anneal_steps=2)
    checkpoint(tmp_path / "checkpoint", config, spiking, step=steps)
    export(options(tmp_path / "checkpoint", tmp_path / "out"))
    assert re.search(message, caplog.text)
    # What a folder says goes on to the next one.
    export(options(tmp_path / "out", tmp_path / "again"))
    first, second = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "again")
    )
    assert first == second


def checkpoint(folder: Path, config: ModelConfig, spiking: SpikingConfig, **facts: Any) -> int:
    """A checkpoint of random weights; returns how many tensors the model has."""
    entries = random_entries(config, torch.float32)
    manifest = {
        "model": TypeAdapter(ModelConfig).dump_python(config, mode="json"),
        "spiking": TypeAdapter(SpikingConfig).dump_python(spiking, mode="json"),
        **facts,
    }
    lazy = [LazyTensor(f"model/{e.name}", e.shape, e.dtype, e.load) for e in entries]
    lazy.append(LazyTensor("optimizer/x", (2,), torch.float32, lambda: torch.ones(2)))
    save_streamed(folder, lazy, manifest)
    return len(entries)


def test_dtype_and_another_format_can_be_asked_for(tmp_path: Path) -> None:
    folder = tiny_sources.save("mistral-full", tmp_path / "hf")
    asked = options(folder, tmp_path / "out", "dtype=bfloat16", "format=llama")
    assert export(asked) is Format.llama
    before, after = read_all(folder), read_all(tmp_path / "out")
    assert all(same_bits(after[name], before[name].to(torch.bfloat16)) for name in before)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["model_type"], written["torch_dtype"]) == ("llama", "bfloat16")


@pytest.mark.parametrize(("own", "written"), [(None, 7), (3, 3)])
def test_generated_text_ends_with_the_tokenizers_end_unless_the_model_names_one(
    own: int | None, written: int, tmp_path: Path
) -> None:
    config = ModelConfig(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, mixers="L F", ffns="d d", eos_token_id=own,
    )  # fmt: skip
    manifest = {
        "model": TypeAdapter(ModelConfig).dump_python(config, mode="json"),
        "tokenizer": {"sha256": "0", "vocab_size": 11, "eos_token_id": 7},
    }
    entries = random_entries(config, torch.float32)
    lazy = [LazyTensor(f"model/{e.name}", e.shape, e.dtype, e.load) for e in entries]
    save_streamed(tmp_path / "checkpoint", lazy, manifest)
    assert export(options(tmp_path / "checkpoint", tmp_path / "out")) is Format.synfire
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == written
    assert read_config(SafetensorsFolder(tmp_path / "out").config).eos_token_id == own


def test_spiking_is_noted_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = ModelConfig(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, mixers="L S", ffns="d d", qkv_bias=True,
        window_tokens=4,
    )  # fmt: skip
    spiking = SpikingConfig(neuron=NeuronKind.adaptive, k=2.0)
    num_tensors = checkpoint(tmp_path / "checkpoint", config, spiking)
    export(options(tmp_path / "checkpoint", tmp_path / "out"))
    assert "spiking (adaptive, k = 2) is noted in config.json" in caplog.text
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["synfire"]["spiking"] == {"neuron": "adaptive", "k": 2.0}
    assert len(read_all(tmp_path / "out")) == num_tensors


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["format=qwen2"], r"mixers \(L S L\) must be only F and S in the qwen2 format"),
        (["format=qwen3"], "in the qwen3 format. Leave format=auto"),
    ],
)
def test_refusals_write_nothing(tmp_path: Path, more: list[str], message: str) -> None:
    folder = tiny_sources.save("qwen2", tmp_path / "hf")
    hybrid: dict[str, Any] = {"mixers": "L S L", "window_tokens": 8}
    convert(ConvertConfig(source=str(folder), out=str(tmp_path / "a"), **hybrid))
    with pytest.raises(ValueError, match=message):
        export(options(tmp_path / "a", tmp_path / "out", *more))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "hf"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["format=gguf"], "format .* must be one of auto, qwen2"),
        (["dtype=int8"], "dtype .* must be one of keep, float64"),
        (["max_shard_bytes=0"], r"max_shard_bytes \(0\) must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(more: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        options(Path("a"), Path("b"), *more)


def test_no_checkpoint_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got nothing there"):
        export(options(tmp_path / "nothing", tmp_path / "out"))
