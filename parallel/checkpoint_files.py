"""Bytes of a checkpoint: data files written with their hash, read back by box, synced to disk.

DCP's file writer and reader with three changes: a file's sha256 is taken while it is written,
tensors are resolved one at a time, and metadata is never unpickled freely. Folders, names and the
order of steps are `parallel.checkpoint`'s.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import (
    FileSystemReader,
    FileSystemWriter,
    _StorageInfo,
)
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from parallel.boxes import Box, BoxLoadPlanner
from parallel.safe_metadata import read_metadata, stored_tensors

MAX_FILE_BYTES = 2 * 2**30
"""Larger plans are cut into several files, which ranks can verify side by side."""
_READ_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What the manifest says of one file."""

    sha256: str
    bytes: int


class HashedFile:
    """A new file that hashes what is written to it and is on the disk once it is closed.

    torch's archive writer answers a failed write with an unrelated internal error, so a failure is
    kept and raised by `check`.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb", buffering=2**20)
        self._hash = hashlib.sha256()
        self._bytes = 0
        self._problem: OSError | None = None

    def write(self, data: Any) -> int:
        """Append bytes-like data."""
        view = memoryview(data).cast("B")
        if self._problem is None:
            try:
                self._file.write(view)
                self._hash.update(view)
                self._bytes += len(view)
            except OSError as error:
                self._problem = error
        return len(view)

    def flush(self) -> None:
        """Nothing: `close` flushes, and torch calls this after every tensor."""

    def tell(self) -> int:
        """Bytes so far."""
        return self._bytes

    def check(self) -> None:
        """Raise what a write ran into (OSError: disk full, file too large)."""
        if self._problem is not None:
            raise self._problem

    def close(self) -> FileFacts:
        """Sync to disk and return the facts; raises OSError like `check`."""
        try:
            self.check()
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            _close_quietly(self._file)
        return FileFacts(self._hash.hexdigest(), self._bytes)


class HashingWriter(FileSystemWriter):
    """Writes this rank's boxes; `files` then holds the facts of its data files."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.files: dict[str, FileFacts] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write every item of the plan, one tensor in memory at a time."""
        prefix = plan.storage_data.prefix
        results: list[WriteResult] = []
        for number, items in enumerate(_split(plan.items, MAX_FILE_BYTES)):
            name = f"{prefix}{number}.distcp"
            file = HashedFile(Path(self.path) / name)
            try:
                for item in items:
                    results.append(_write_tensor(file, name, item, planner))
            except BaseException:
                _close_quietly(file._file)
                raise
            self.files[name] = file.close()
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def storage_meta(self) -> StorageMeta:
        """Nothing about where this was written: checkpoints are moved."""
        return StorageMeta()


def read_boxes(directory: Path, tensors: Mapping[str, Box]) -> None:
    """Fill boxes from a checkpoint's files, in place, whatever layout wrote them.

    Raises:
        ValueError: a tensor that is not there, has another shape, or is not there completely.
    """
    metadata = read_metadata(directory)
    _check_request(directory, metadata, tensors)
    planner = BoxLoadPlanner()
    planner.set_up_planner(dict(tensors), metadata, is_coordinator=True)
    reader = FileSystemReader(directory)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    plan = planner.finish_plan(reader.prepare_local_plan(planner.create_local_plan()))
    found = dict.fromkeys(tensors, 0)
    for item in plan.items:
        found[item.dest_index.fqn] += math.prod(item.lengths)
    for name, box in tensors.items():
        if found[name] != box.local.numel():
            raise ValueError(
                f"{directory}: {name} must hold {box.local.numel()} values of this rank's part: "
                f"got {found[name]}. The checkpoint is incomplete; use another one."
            )
    reader.read_data(plan, planner).wait()


def file_facts(path: Path) -> FileFacts:
    """Hash a file that is already there."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
            size += len(block)
    return FileFacts(digest.hexdigest(), size)


def sync(path: Path) -> None:
    """Make a file, or a folder's list of names, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_tensor(
    file: HashedFile, name: str, item: WriteItem, planner: SavePlanner
) -> WriteResult:
    tensor = planner.resolve_data(item)
    assert isinstance(tensor, Tensor)
    tensor = tensor.detach().cpu()
    if tensor.untyped_storage().nbytes() != tensor.nbytes or not tensor.is_contiguous():
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    offset = file.tell()
    try:
        # torch asks for no more than `write` and `flush`.
        torch.save(tensor, file)  # type: ignore[arg-type]
    except RuntimeError:
        file.check()
        raise
    file.check()
    length = file.tell() - offset
    return WriteResult(
        index=item.index, size_in_bytes=length, storage_data=_StorageInfo(name, offset, length)
    )


def _split(items: list[WriteItem], max_bytes: int) -> Iterator[list[WriteItem]]:
    """Cut a plan into files of at most `max_bytes` (or one tensor)."""
    part: list[WriteItem] = []
    size = 0
    for item in items:
        data = item.tensor_data
        assert data is not None
        bytes_ = math.prod(data.chunk.sizes) * data.properties.dtype.itemsize
        if part and size + bytes_ > max_bytes:
            yield part
            part, size = [], 0
        part.append(item)
        size += bytes_
    if part:
        yield part


def _check_request(directory: Path, metadata: Metadata, tensors: Mapping[str, Box]) -> None:
    stored = stored_tensors(metadata)
    missing = [name for name in tensors if name not in stored]
    if missing:
        raise ValueError(
            f"{directory} must hold {missing[0]}: it is not among its {len(stored)} tensors "
            f"({len(missing)} of {len(tensors)} are missing). Use a checkpoint of this model."
        )
    for name, box in tensors.items():
        shape = tuple(stored[name].size)
        if shape != box.global_shape:
            raise ValueError(
                f"{directory}: {name} {shape} must have shape {box.global_shape}. "
                "Use a checkpoint of this model, or change the model to match."
            )


def _close_quietly(file: Any) -> None:
    """Close a file whose last flush may fail as the write before it did."""
    with contextlib.suppress(OSError):
        file.close()
