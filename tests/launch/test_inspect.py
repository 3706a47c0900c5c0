"""`launch.inspect` on each kind of folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from launch.convert import convert
from launch.convert_config import ConvertConfig
from launch.inspect import InspectConfig, describe, differences, report
from parallel.checkpoint import CheckpointError
from tests.models.conversion import tiny_sources

pytest.importorskip("transformers")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_sources.save("qwen2", tmp_path / "hf", dtype=torch.bfloat16)


@pytest.fixture
def checkpoint(folder: Path, tmp_path: Path) -> Path:
    convert(
        ConvertConfig(
            source=str(folder), out=str(tmp_path / "checkpoint"), mixers="L S L", window_tokens=8
        )
    )
    return tmp_path / "checkpoint"


def test_hugging_face_folder(folder: Path) -> None:
    facts = describe(folder)
    assert facts["kind"] == "Hugging Face folder"
    assert facts["format"] == "qwen2"
    assert facts["pattern"] == "mixers F*3 | ffns d*3"
    count = sum(p.numel() for p in tiny_sources.build("qwen2").parameters())
    assert facts["parameters"] == f"{count:,} (0 new)"
    assert facts["tensors"] == f"39, {2 * count:,} bytes (39 bfloat16)"
    assert facts["tokenizer"] == "none"


def test_synfire_checkpoint(checkpoint: Path) -> None:
    text = report(InspectConfig(checkpoint=str(checkpoint)))
    for line in (
        "kind                 Synfire checkpoint",
        "pattern              mixers L S L | ffns d*3",
        "window_tokens        8",
        "step                 0",
        "spiking              off",
        "files                3, sha256 verified",
        "certificate          39 copied, 8 new; 0 unexplained; numeric part skipped",
    ):
        assert line in text
    assert "(39 bfloat16, 8 float32)" in text
    unverified = report(InspectConfig(checkpoint=str(checkpoint), verify=False))
    assert "files                3, not verified" in unverified


def test_damage_is_an_error(checkpoint: Path) -> None:
    (data,) = checkpoint.glob("*.distcp")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match="has other contents"):
        report(InspectConfig(checkpoint=str(checkpoint)))


def test_settings_of_two_checkpoints_are_compared(folder: Path, checkpoint: Path) -> None:
    assert differences(folder, checkpoint) == [
        ("model.mixers", "F*3", "L S L"), ("model.window_tokens", None, 8),
    ]  # fmt: skip
    text = report(InspectConfig(checkpoint=str(folder), against=str(checkpoint)))
    assert f"2 settings differ from {checkpoint} (here -> there)" in text
    assert "model.mixers  F*3 -> L S L" in text
    assert differences(checkpoint, checkpoint) == []


def test_run_folders_show_their_checkpoints_and_compare_their_configs(
    checkpoint: Path, tmp_path: Path
) -> None:
    for name, lr in (("a", 0.1), ("b", 0.2)):
        run = tmp_path / name
        for step in (3, 6):
            shutil.copytree(checkpoint, run / "checkpoints" / f"step_{step:08d}")
        (run / "config.yaml").write_text(f"seed: 1\nstages:\n  main:\n    lr: {lr}\n")
    facts = describe(tmp_path / "a")
    assert facts["kind"] == "run folder"
    assert facts["checkpoints"] == "step_00000003, step_00000006"
    assert facts["newest"] == "step_00000006"
    assert differences(tmp_path / "a", tmp_path / "b") == [("stages.main.lr", 0.1, 0.2)]


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got nothing there"):
        report(InspectConfig(checkpoint=str(tmp_path / "nothing")))
