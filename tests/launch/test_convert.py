"""`launch.convert` end to end: checkpoint and certificate out, with and without sample text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch.compose import load_config
from launch.convert import convert
from launch.convert_config import ConvertConfig
from models.config import ModelConfig
from parallel.checkpoint import read_manifest, read_tensors, tensor_dtypes, verify
from tests.launch.converting import VOCABULARY, config, hybrid, source, text
from tests.models.conversion import tiny_sources
from tests.models.conversion.test_huggingface import same_bits
from training.weight_source import open_weights

pytest.importorskip("transformers")
__all__ = ["source", "text"]


REPOSITORY = Path(__file__).resolve().parents[2]


def test_conversion_writes_a_verified_checkpoint(source: Path, text: Path, tmp_path: Path) -> None:
    certificate = convert(hybrid(source, tmp_path / "out", text=str(text)))
    out = tmp_path / "out"
    verify(out)
    assert json.loads((out / "certificate.json").read_text()) == certificate
    assert certificate["origins"] == {"copied": 51, "reshaped": 0, "scaled": 0, "new": 8}
    assert certificate["source"]["unused_tensors"] == []
    assert certificate["numeric"]["perplexity"]["source"] > 1
    assert len(certificate["numeric"]["linear_layers"]) == 2
    opened = open_weights(out)
    assert opened.model.layers.describe() == "mixers [L S]*2 | ffns d*4"
    assert opened.model.window_tokens == 8
    assert len(opened.new_parameters) == 8
    assert opened.tokenizer_sha256 == open_weights(source).tokenizer_sha256
    assert (out / "tokenizer" / "tokenizer.model").is_file()
    manifest = read_manifest(out)
    assert (manifest["step"], manifest["stage"], manifest["tokens"]) == (0, None, 0)
    assert "tokenizer/tokenizer.model" in manifest["files"]
    assert "certificate.json" in manifest["files"]
    stored = load_file(source / "model.safetensors")
    written = dict(read_tensors(out))
    for name, entry in certificate["tensors"].items():
        if entry["origin"] == "copied":
            assert same_bits(written[f"model/{name}"], stored[entry["source"][0]])
    norm = written["model/blocks.0.mixer.head_norm.weight"]
    assert (norm > 0).all()
    assert not torch.allclose(norm, torch.ones_like(norm))


def test_import_without_a_target_keeps_bits_and_dtype(tmp_path: Path) -> None:
    folder = tiny_sources.save("llama", tmp_path / "hf", dtype=torch.bfloat16)
    certificate = convert(config(folder, tmp_path / "out"))
    assert certificate["origins"]["copied"] == certificate["target"]["num_tensors"]
    assert certificate["numeric"] == {"skipped": True}
    stored = load_file(folder / "model.safetensors")
    assert set(tensor_dtypes(tmp_path / "out").values()) == {torch.bfloat16}
    for name, tensor in read_tensors(tmp_path / "out"):
        origin = certificate["tensors"][name.removeprefix("model/")]["source"][0]
        assert same_bits(tensor, stored[origin])


def test_alignment_is_in_the_certificate(source: Path, text: Path, tmp_path: Path) -> None:
    align = load_config("convert", ConvertConfig, [
        f"source={source}", f"out={tmp_path}", f"text={text}", "align.tokens=600",
        "align.rows_per_step=1",
    ]).align  # fmt: skip
    found = convert(hybrid(source, tmp_path / "out", text=str(text), align=align))
    assert [entry["layer"] for entry in found["alignment"]] == [0, 2]
    assert all(entry["tokens"] == 608 for entry in found["alignment"])
    assert any(entry["after"] < entry["before"] for entry in found["alignment"])


def test_numeric_part_can_be_skipped(source: Path, text: Path, tmp_path: Path) -> None:
    options = load_config("convert", ConvertConfig, [
        f"source={source}", f"out={tmp_path}", "certificate.numeric=false",
        "linear.key_bias=zero", "gate_init=64",
    ])  # fmt: skip
    assert options.options.gate_init == 64
    found = convert(hybrid(source, tmp_path / "out", text=str(text), linear=options.linear,
                           certificate=options.certificate))  # fmt: skip
    assert found["numeric"] == {"skipped": True}
    assert found["origins"]["scaled"] == 2
    notes = {entry["note"] for entry in found["tensors"].values()}
    assert any(note.startswith("RMS of the source's attention output") for note in notes)


def test_named_model_and_changed_pattern(source: Path, tmp_path: Path) -> None:
    named = ModelConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, mixers="L*4", ffns="d*4", qkv_bias=True,
    )  # fmt: skip
    convert(config(source, tmp_path / "a", model=named))
    opened = open_weights(tmp_path / "a")
    assert opened.model.mixers == "L*4"
    convert(config(source, tmp_path / "b", model=named, mixers="L S L L", window_tokens=3,
                   window_includes_self=False))  # fmt: skip
    assert open_weights(tmp_path / "b").model.visible_window_tokens == 4


def test_conversion_is_reproducible(source: Path, text: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        convert(hybrid(source, tmp_path / name, text=str(text)))
    first, second = (dict(read_tensors(tmp_path / name)) for name in ("a", "b"))
    assert all(same_bits(first[name], second[name]) for name in first)
    files = [(tmp_path / name / "certificate.json").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]


def test_the_same_conversion_has_the_same_fingerprint(source: Path, tmp_path: Path) -> None:
    prints = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        convert(hybrid(source, tmp_path / name, seed=seed))
        prints.append(open_weights(tmp_path / name).fingerprint())
    assert prints[0] == prints[1] != prints[2]
    manifest = read_manifest(tmp_path / "a")
    for name, is_same in (("certificate.json", True), ("__0_0.distcp", False)):
        manifest["files"][name]["sha256"] = "0" * 64
        (tmp_path / "a" / "manifest.json").write_text(json.dumps(manifest))
        found = open_weights(tmp_path / "a", check_files=False).fingerprint()
        assert (found == prints[0]) is is_same


@pytest.mark.slow
def test_command_line(source: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "launch.convert", *arguments]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)

    done = run(f"source={source}", f"out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    assert "51 copied, 0 unused source tensors" in done.stderr
    wrong = run(f"source={tmp_path / 'nowhere'}", f"out={tmp_path / 'b'}")
    assert wrong.returncode == 1
    assert "must hold config.json" in wrong.stderr
    assert "Traceback" not in wrong.stderr
