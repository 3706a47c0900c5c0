from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from data import prepared
from data.prepared import (
    check_contents,
    check_files,
    describe_files,
    open_tokenizer,
    read_manifest,
)
from data.tokenizer import file_sha256, load_tokenizer
from data.tokenizer_training import train_sentencepiece
from tests.data.prepared_folder import random_documents, write_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "data", random_documents(20), heldout=random_documents(3))


def test_a_manifest_survives_the_disk(folder: Path) -> None:
    manifest = read_manifest(folder)
    manifest.write(folder)
    assert read_manifest(folder) == manifest
    check_files(folder, manifest, hashes=True)


def test_the_fingerprint_names_the_content_wherever_it_lies(folder: Path, tmp_path: Path) -> None:
    held = random_documents(3)
    same = write_folder(tmp_path / "b", random_documents(20), heldout=held)
    other = write_folder(tmp_path / "c", random_documents(20, seed=1), heldout=held)
    wider = write_folder(tmp_path / "d", random_documents(20), heldout=held, vocab_size=101)
    prints = [read_manifest(path).fingerprint for path in (folder, same, other, wider)]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


@pytest.mark.parametrize("name", ["train.bin", "train.idx", "heldout.bin"])
def test_missing_cut_and_changed_files_are_named(folder: Path, name: str) -> None:
    manifest = read_manifest(folder)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=rf"{name} \(\d+ bytes\) must have .*truncated"):
        check_files(folder, manifest)
    (folder / name).write_bytes(whole + b"x")
    with pytest.raises(ValueError, match=rf"{name} .*changed"):
        check_files(folder, manifest)
    (folder / name).write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    check_files(folder, manifest)
    with pytest.raises(ValueError, match=rf"{name} \(sha256 .*must have the manifest's hash"):
        check_files(folder, manifest, hashes=True)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"{name} must exist"):
        check_files(folder, manifest)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"data\.path .* must be a prepared folder.*launch\.prepare"),
        ("{", r"manifest\.json must be a manifest"),
        ("[]", r"manifest\.json must be a manifest"),
        ('{"format_version": 1}', r"manifest\.json must be a manifest"),
        ('{"format_version": 9}', r"format_version \(9\) must be 1"),
    ],
)
def test_folders_that_are_not_prepared_are_refused(
    tmp_path: Path, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_manifest(tmp_path)


def test_a_swapped_tokenizer_is_refused(tmp_path: Path) -> None:
    train_sentencepiece(["some text\n" * 50], tmp_path / "first", vocab_size=275)
    train_sentencepiece(["other words\n" * 50], tmp_path / "second", vocab_size=275)
    first = load_tokenizer(tmp_path / "first")
    folder = write_folder(tmp_path / "data", random_documents(5), tokenizer_sha256=first.sha256)
    first.copy_to(folder / "tokenizer")
    assert open_tokenizer(folder).sha256 == first.sha256
    load_tokenizer(tmp_path / "second").copy_to(folder / "tokenizer")
    with pytest.raises(ValueError, match="must be the tokenizer of"):
        open_tokenizer(folder)


def test_every_file_is_described_but_the_manifest(folder: Path) -> None:
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "x").write_text("abc")
    files = describe_files(folder)
    assert sorted(files) == ["heldout.bin", "heldout.idx", "tokenizer/x", "train.bin", "train.idx"]
    assert files["tokenizer/x"]["bytes"] == 3
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files["tokenizer/x"]["sha256"] == expected
    assert json.loads((folder / "manifest.json").read_text())["format_version"] == 1


def flip(path: Path) -> None:
    """Change one bit and nothing else that a listing shows but the time."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def test_contents_are_hashed_once_for_each_state_of_the_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_manifest(folder)
    hashed: list[str] = []

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return file_sha256(path)

    monkeypatch.setattr(prepared, "file_sha256", counted)
    check_contents(folder, manifest)
    assert sorted(hashed) == sorted(Path(name).name for name in manifest.files)
    check_contents(folder, manifest)
    assert len(hashed) == len(manifest.files)
    (folder / "train.bin").touch()
    check_contents(folder, manifest)
    assert len(hashed) == 2 * len(manifest.files)
    flip(folder / "train.bin")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"train\.bin .*must have the manifest's hash"):
            check_contents(folder, manifest)


def test_a_folder_that_cannot_be_written_is_hashed_every_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: Path, text: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_text", refuse)
    with caplog.at_level(logging.INFO):
        check_contents(folder, read_manifest(folder))
    assert "is hashed at every start" in caplog.text
