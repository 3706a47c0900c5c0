"""Hostile `.metadata` files are refused before anything in them runs."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from parallel.checkpoint import Box, CheckpointError, load, save, verify
from parallel.checkpoint_files import file_facts
from parallel.safe_metadata import UnsafeMetadataError, read_metadata


class Touch:
    """Unpickles into a call that creates a file."""

    def __init__(self, path: Path, how: str) -> None:
        self.path, self.how = path, how

    def __reduce__(self) -> tuple[Any, ...]:
        if self.how == "system":
            return (os.system, (f"touch {self.path}",))
        return (eval, (f"open({str(self.path)!r}, 'w')",))


def describe(**changes: Any) -> Metadata:
    entry = TensorStorageMetadata(
        TensorProperties(dtype=torch.float32),
        torch.Size([2]),
        [ChunkStorageMetadata(torch.Size([0]), torch.Size([2]))],
    )
    place = _StorageInfo(changes.pop("path", "__0_0.distcp"), 0, 10)
    entries = {"w": changes.pop("entry", entry)}
    return Metadata(entries, storage_data={MetadataIndex("w", [0], 0): place}, **changes)


def write(folder: Path, value: Any) -> Path:
    (folder / ".metadata").write_bytes(pickle.dumps(value))
    return folder


def test_honest_metadata_is_read(tmp_path: Path) -> None:
    found = read_metadata(write(tmp_path, describe()))
    entry = found.state_dict_metadata["w"]
    assert isinstance(entry, TensorStorageMetadata)
    assert entry.size == torch.Size([2])
    assert entry.properties.dtype == torch.float32
    assert entry.properties.layout == torch.strided


@pytest.mark.parametrize("how", ["system", "eval"])
@pytest.mark.parametrize("where", ["alone", "inside"])
def test_a_hostile_pickle_does_not_run(tmp_path: Path, how: str, where: str) -> None:
    marker = tmp_path / "ran"
    bomb = Touch(marker, how)
    write(tmp_path, bomb if where == "alone" else describe(planner_data=bomb))
    with pytest.raises(UnsafeMetadataError, match=r"asks for .*(system|eval).*not\s+executed"):
        read_metadata(tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["load", "serialization.os.system"])
def test_other_names_of_torch(tmp_path: Path, name: str) -> None:
    """Pickle protocol 4 looks names with dots up step by step."""
    ask = b"\x80\x04\x8c\x05torch\x8c" + bytes([len(name)]) + name.encode() + b"\x93."
    (tmp_path / ".metadata").write_bytes(ask)
    with pytest.raises(UnsafeMetadataError, match=f"asks for torch.{name}"):
        read_metadata(tmp_path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.save, "asks for torch.serialization.save"),
        ([1, 2], "it is a list"),
        (describe(entry=BytesStorageMetadata()), "asks for .*BytesStorageMetadata"),
        (describe(entry=3), "'w' is no tensor"),
        (describe(path="../../outside"), "'w' lies outside the folder"),
        (describe(path="/etc/passwd"), "'w' lies outside the folder"),
        (describe(entry=TensorStorageMetadata(TensorProperties(), torch.Size([1]), [])), None),
    ],
)  # fmt: skip
def test_other_contents_are_refused(tmp_path: Path, value: Any, message: str | None) -> None:
    write(tmp_path, value)
    if message is None:
        read_metadata(tmp_path)
        return
    with pytest.raises(UnsafeMetadataError, match=message):
        read_metadata(tmp_path)


def test_cut_short(tmp_path: Path) -> None:
    data = pickle.dumps(describe())
    (tmp_path / ".metadata").write_bytes(data[: len(data) // 2])
    with pytest.raises(UnsafeMetadataError, match="must hold only torch's description of tensors"):
        read_metadata(tmp_path)


def test_loading_a_checkpoint_with_a_planted_metadata(tmp_path: Path) -> None:
    folder, marker = tmp_path / "c", tmp_path / "ran"
    save(folder, {"w": Box.whole(torch.ones(2))}, {})
    write(folder, Touch(marker, "system"))
    target = {"w": Box.whole(torch.zeros(2))}
    with pytest.raises(CheckpointError, match=r"damaged: \.metadata has"):
        load(folder, target)
    # A forger may also correct the manifest: the unpickler still refuses.
    facts = file_facts(folder / ".metadata")
    manifest = (folder / "manifest.json").read_text()
    lines = manifest.splitlines()
    start = next(i for i, line in enumerate(lines) if '".metadata"' in line)
    lines[start + 1] = f'   "sha256": "{facts.sha256}",'
    lines[start + 2] = f'   "bytes": {facts.bytes}'
    (folder / "manifest.json").write_text("\n".join(lines))
    verify(folder)
    with pytest.raises(CheckpointError, match="could not be loaded: UnsafeMetadataError"):
        load(folder, target)
    assert not marker.exists()
    assert target["w"].local.tolist() == [0.0, 0.0]
