"""Sample text of `launch.convert`: where it comes from and how it is shared out."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from data.tokenizer import load_tokenizer
from launch.convert import convert
from launch.sample_text import SampleSizes, read_sample
from parallel.checkpoint import read_manifest
from tests.data.prepared_folder import random_documents, write_folder
from tests.launch.converting import hybrid, source, text

pytest.importorskip("transformers")
__all__ = ["source", "text"]


def test_text_file_is_encoded_with_the_sources_tokenizer(source: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" ".join(f"word{n % 13} {n}" for n in range(900)))
    found = convert(hybrid(source, tmp_path / "out", text=str(tmp_path / "a.txt")))
    assert found["numeric"]["tokens"] == 128


def test_text_of_another_tokenizer_is_refused(source: Path, text: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "data", random_documents(9), heldout=random_documents(9))
    with pytest.raises(ValueError, match="must be prepared with the source's tokenizer: got"):
        convert(hybrid(source, tmp_path / "out", text=str(tmp_path / "data")))
    bare = tmp_path / "bare"
    shutil.copytree(source, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(ValueError, match="no tokenizer.json or tokenizer.model to encode"):
        convert(hybrid(bare, tmp_path / "out", text=str(source / "config.json")))
    convert(hybrid(bare, tmp_path / "out", text=str(text)))
    assert read_manifest(tmp_path / "out")["tokenizer"] is None


def test_sample_text_parts(source: Path, text: Path, tmp_path: Path) -> None:
    sizes = SampleSizes(sequence_length=16, tokens=64, align_tokens=70)
    tokenizer = load_tokenizer(source)
    parts = read_sample(text, sizes, tokenizer=tokenizer, seed=1)
    assert parts.alignment is not None
    assert parts.calibration.tokens.shape == parts.evaluation.tokens.shape == (4, 16)
    assert parts.alignment.tokens.shape == (5, 16)
    found = {tuple(row) for row in parts.calibration.tokens.tolist()}
    assert found.isdisjoint(tuple(row) for row in parts.alignment.tokens.tolist())
    assert not torch.equal(parts.calibration.tokens, parts.evaluation.tokens)
    path = tmp_path / "a.txt"
    path.write_text(" ".join(str(number) for number in range(400)))
    ids = tokenizer.encode(path.read_text())
    parts = read_sample(path, sizes, tokenizer=tokenizer, seed=1)
    assert parts.alignment is not None
    assert parts.calibration.tokens.flatten().tolist() == ids[:64]
    assert parts.calibration.labels.flatten().tolist() == ids[1:65]
    assert parts.alignment.tokens.flatten().tolist() == ids[64:144]
    assert parts.alignment.labels.flatten().tolist() == ids[65:145]
    rows = (len(ids) - 1) // 16
    assert parts.evaluation.tokens.flatten().tolist() == ids[(rows - 4) * 16 : rows * 16]
    assert parts.evaluation.labels.flatten().tolist() == ids[(rows - 4) * 16 + 1 : rows * 16 + 1]
    path.write_text("short")
    with pytest.raises(ValueError, match="must give two rows: got sequence_length 16"):
        read_sample(path, sizes, tokenizer=tokenizer, seed=1)


def test_short_text_is_shared_out_with_a_warning(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = load_tokenizer(source)
    (tmp_path / "a.txt").write_text(" ".join(str(number) for number in range(60)))
    sizes = SampleSizes(sequence_length=16, tokens=1600, align_tokens=0)
    parts = read_sample(tmp_path / "a.txt", sizes, tokenizer=tokenizer, seed=1)
    assert 1 <= parts.evaluation.num_rows <= parts.calibration.num_rows
    assert "fitting on" in caplog.text


def test_short_text_keeps_fitting_and_aligning_apart(source: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(source)
    (tmp_path / "a.txt").write_text(" ".join(str(number) for number in range(60)))
    ids = tokenizer.encode((tmp_path / "a.txt").read_text())
    found = (len(ids) - 1) // 16
    sizes = SampleSizes(sequence_length=16, tokens=1600, align_tokens=1600)
    parts = read_sample(tmp_path / "a.txt", sizes, tokenizer=tokenizer, seed=1)
    assert parts.alignment is not None
    rows = [part.tokens for part in (parts.calibration, parts.alignment, parts.evaluation)]
    assert torch.cat(rows).flatten().tolist() == ids[: found * 16]
    assert all(len(part) > 0 for part in rows)
    (tmp_path / "a.txt").write_text(" ".join(str(number) for number in range(24)))
    with pytest.raises(ValueError, match="must give three rows to align on"):
        read_sample(tmp_path / "a.txt", sizes, tokenizer=tokenizer, seed=1)
