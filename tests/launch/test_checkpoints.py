"""Any checkpoint opens as the model it is: exact weights, tokenizer, manifest, spiking."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter

from launch.checkpoints import full_spikes, open_model
from launch.compose import load_config
from launch.export import ExportConfig, export
from launch.model_source import checkpoint_model, model_from_checkpoint
from models.config import ModelConfig, NeuronKind, SpikingConfig
from models.sequence import SequenceContext
from parallel.checkpoint import CheckpointError, newest_complete, read_tensors, step_directory
from parallel.config import Precision
from tests.launch.trained import prepared, trained, without_tokenizer
from tests.models.conversion import tiny_sources
from tests.support.closeness import assert_close
from training.resolved_config import read_config

__all__ = ["prepared", "trained"]

ADAPTIVE = SpikingConfig(neuron=NeuronKind.adaptive)


def test_a_run_folder_opens_as_its_newest_checkpoint(trained: Path, prepared: Path) -> None:
    opened = open_model(trained)
    assert opened.manifest is not None
    assert opened.manifest["step"] == 6
    assert opened.config.mixers == "L S"
    assert opened.tokenizer is not None
    text = "def alpha_beta(gamma):\n"
    assert opened.tokenizer.decode(opened.tokenizer.encode(text)) == text
    newest = newest_complete(trained)
    assert newest is not None
    saved = dict(read_tensors(newest))
    for name, parameter in opened.model.named_parameters():
        assert torch.equal(parameter, saved[f"model/{name}"]), name
        assert not parameter.requires_grad
    assert open_model(step_directory(trained, 4)).manifest["step"] == 4  # type: ignore[index]


@pytest.mark.parametrize("case", ["qwen2", "qwen2-tied", "qwen3", "llama", "mistral"])
def test_a_hugging_face_folder_computes_what_transformers_does(case: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folder = tiny_sources.save(case, tmp_path / "hf", dtype=torch.float64)
    opened = open_model(folder, precision=Precision.fp64)
    assert opened.manifest is None
    assert opened.tokenizer is None
    tokens = torch.arange(22).reshape(2, 11) % 61
    context = SequenceContext.one_document_per_row(2, 11)
    with torch.no_grad():
        theirs = tiny_sources.build(case, dtype=torch.float64)(tokens).logits
    assert_close(opened.model(tokens, context), theirs, relative=1e-6)


def test_bf16_keeps_norms_gates_and_biases_in_float32(trained: Path) -> None:
    opened = open_model(trained, precision=Precision.bf16)
    dtypes = {name: parameter.dtype for name, parameter in opened.model.named_parameters()}
    assert dtypes["blocks.0.mixer.q_proj.weight"] is torch.bfloat16
    assert dtypes["embedding.weight"] is torch.bfloat16
    for name in ("blocks.0.mixer.gate_up.bias", "blocks.0.mixer.head_norm.weight",
                 "blocks.1.mixer.q_proj.bias", "final_norm.weight"):  # fmt: skip
        assert dtypes[name] is torch.float32
    tokens = torch.arange(20)[None]
    context = SequenceContext.one_document_per_row(1, 20)
    exact = open_model(trained, precision=Precision.fp64).model(tokens, context)
    assert_close(opened.model(tokens, context), exact, relative=0.05)


def test_spiking_is_chosen_by_the_caller_and_its_absence_is_said(
    trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        plain = open_model(trained)
    message = "was trained with spiking and runs without it; add spiking=adaptive to spike"
    assert message in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        spiking = open_model(trained, spiking=ADAPTIVE)
    assert "runs without it" not in caplog.text
    tokens = torch.arange(20)[None]
    context = SequenceContext.one_document_per_row(1, 20)
    assert torch.equal(plain.model(tokens, context), spiking.model(tokens, context))
    spiked = spiking.model(tokens, context, spikes=full_spikes(ADAPTIVE))
    assert not torch.equal(spiked, plain.model(tokens, context))
    assert full_spikes(SpikingConfig()) is None


def test_another_neuron_than_the_trained_one_is_said(
    trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = SpikingConfig(neuron=NeuronKind.adaptive, k=2.0, max_count=7)
    open_model(trained, spiking=other)
    assert "add spiking.k=3.0 spiking.max_count=null for its own" in caplog.text
    caplog.clear()
    open_model(trained, spiking=ADAPTIVE)
    assert caplog.text == ""


def test_an_exported_model_that_spikes_is_said_to_run_without(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for format in ("synfire", "gla_swa"):
        arguments = [f"checkpoint={trained}", f"out={tmp_path / format}", f"format={format}"]
        export(load_config("export", ExportConfig, arguments))
    caplog.set_level(logging.INFO)
    caplog.clear()
    open_model(tmp_path / "synfire")
    assert "was trained with spiking and runs without it; add spiking=adaptive" in caplog.text
    caplog.clear()
    open_model(tmp_path / "synfire", spiking=ADAPTIVE)
    open_model(tmp_path / "gla_swa")
    assert "spik" not in caplog.text


def test_one_damaged_checkpoint_is_refused_by_its_name(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "one"
    shutil.copytree(step_directory(trained, 6), folder)
    data = folder / "__0_0.distcp"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp has other contents"):
        open_model(folder)
    arguments = [f"checkpoint={folder}", f"out={tmp_path / 'out'}"]
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp has other contents"):
        export(load_config("export", ExportConfig, arguments))


def test_a_tokenizer_that_nobody_can_load_does_not_lock_the_weights_away(
    trained: Path, tmp_path: Path
) -> None:
    folder = without_tokenizer(step_directory(trained, 6), tmp_path / "one")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer_config.json").write_text("{}")
    assert open_model(folder).tokenizer is None


def test_the_model_of_a_run_outlives_what_it_began_with(trained: Path, tmp_path: Path) -> None:
    raw = {
        "init": {"checkpoint": str(tmp_path / "gone")}, "model": {}, "run_dir": str(trained),
    }  # fmt: skip
    assert model_from_checkpoint(raw)["model"] == checkpoint_model(trained)
    with pytest.raises(ValueError, match="gone.* must be a folder"):
        model_from_checkpoint({**raw, "run_dir": str(tmp_path / "new")})
    with pytest.raises(
        ValueError, match=r"init\.checkpoint \(null\) must be a checkpoint for model"
    ):
        model_from_checkpoint({**raw, "init": {"checkpoint": None}})
    by_hand = {**raw, "init": {"checkpoint": None}, "model": {"hidden_size": 8}}
    assert model_from_checkpoint(by_hand) == by_hand


def test_the_model_of_a_checkpoint_is_what_the_run_was_given(trained: Path) -> None:
    values = checkpoint_model(trained)
    assert values == read_config(trained / "config.yaml")["model"]
    assert TypeAdapter(ModelConfig).validate_python(values) == open_model(trained).config


def edited(trained: Path, folder: Path, **model: object) -> Path:
    """A copy of the newest checkpoint whose manifest describes another model."""
    shutil.copytree(step_directory(trained, 6), folder)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["model"].update(model)
    path.write_text(json.dumps(manifest))
    return folder


def test_a_manifest_of_another_model_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"hold exactly its model's parameters: .* only in the"):
        open_model(edited(trained, tmp_path / "names", tie_word_embeddings=True))
    with pytest.raises(ValueError, match=r"\.weight \(300, 16\) of .* shape: got \(301, 16\)"):
        open_model(edited(trained, tmp_path / "shapes", vocab_size=301))
