"""Checkpoints: saved whole or not at all, loaded under any layout (design 5.6).

`save` writes boxes of all ranks through DCP into a temporary folder, hashes and syncs every file,
and renames. Whatever goes wrong on any rank becomes one error on all of them, and older checkpoints
stay as they are. Which step is saved when is the loop's business.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from parallel.boxes import Box, BoxSavePlanner, LazyTensor
from parallel.checkpoint_files import FileFacts, HashingWriter, file_facts, read_boxes, sync
from parallel.checkpoint_folders import (
    FORMAT_VERSION,
    KIND,
    MANIFEST_NAME,
    CheckpointError,
    DamagedCheckpointError,
    is_step_name,
    newest_complete,
    prune,
    read_manifest,
    set_aside,
    step_directory,
    verify,
)
from parallel.mesh import Mesh, RankError, agreed
from parallel.safe_metadata import UnsafeMetadataError, read_metadata, stored_tensors

__all__ = [
    "Box", "CheckpointError", "DamagedCheckpointError", "LazyTensor", "UnsafeMetadataError", "load",
    "newest_complete", "prune", "read_manifest", "read_tensors", "save", "save_streamed",
    "set_aside", "step_directory", "tensor_dtypes", "tensor_shapes", "verify",
]  # fmt: skip

AddFiles = Callable[[Path], None]


def save(
    directory: Path,
    tensors: Mapping[str, Box] | Mapping[str, LazyTensor],
    manifest: Mapping[str, Any],
    *,
    mesh: Mesh | None = None,
    add_files: AddFiles | None = None,
) -> None:
    """Write one checkpoint; collective when `mesh` is given.

    Args:
        directory: its final place; an older checkpoint there is replaced.
        tensors: this rank's boxes by key (`model/<name>`, `optimizer/<state>/<name>`).
        manifest: plain JSON values; kind, format version and files are added.
        mesh: the ranks that save together, None for this process alone.
        add_files: puts more files (a tokenizer) into the folder it is given; runs on one rank.

    Raises:
        CheckpointError: on every rank alike. The temporary folder is gone, older checkpoints are
            untouched.
    """
    temporary = directory.with_name(f".{directory.name}.partial")
    is_main = mesh is None or mesh.is_main
    try:
        agreed(mesh, "preparing", lambda: _prepare(directory, temporary) if is_main else None)
        written = _write(temporary, tensors, mesh)

        def complete() -> None:
            if is_main:
                _add(temporary, add_files, written)
                _write_manifest(temporary, manifest, written)
                _rename(temporary, directory)

        agreed(mesh, "completing", complete)
    except (Exception, CheckpointException) as error:
        if is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint ({directory}) could not be written: {_reason(error)}. Older checkpoints "
            "are unchanged. Free space there or choose another place, and run the same command "
            "again."
        ) from error


def save_streamed(
    directory: Path,
    tensors: Sequence[LazyTensor],
    manifest: Mapping[str, Any],
    *,
    add_files: AddFiles | None = None,
) -> None:
    """Write tensors that are made one by one while they are written, in one process.

    Never holds more than one of them. Errors as `save`.
    """
    save(directory, {tensor.name: tensor for tensor in tensors}, manifest, add_files=add_files)


def load(
    directory: Path,
    tensors: Mapping[str, Box],
    *,
    mesh: Mesh | None = None,
    is_verified: bool = False,
) -> None:
    """Fill this rank's boxes in place from a checkpoint that any layout wrote.

    Dtypes are converted. `is_verified` skips the hashes of a folder that `newest_complete` chose.

    Raises:
        CheckpointError: missing, damaged or hostile files, or tensors of another model.
    """
    if not is_verified:
        verify(directory, mesh=mesh)
    try:
        agreed(mesh, f"loading {directory}", lambda: read_boxes(directory, tensors))
    except (ValueError, OSError, RuntimeError, AssertionError) as error:
        raise CheckpointError(
            f"checkpoint ({directory}) could not be loaded: {_reason(error)}"
        ) from error


def read_tensors(
    directory: Path, names: Sequence[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors one by one on the CPU, all of them or those named, in stored dtype.

    Raises:
        ValueError: a name that is not there.
    """
    shapes, dtypes = tensor_shapes(directory), tensor_dtypes(directory)
    for name in shapes if names is None else names:
        if name not in shapes:
            raise ValueError(f"{directory} must hold {name}: got {len(shapes)} other tensors.")
        tensor = torch.empty(shapes[name], dtype=dtypes[name])
        read_boxes(directory, {name: Box.whole(tensor)})
        yield name, tensor


def tensor_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Global shape of every stored tensor by key; reads no tensor."""
    entries = stored_tensors(read_metadata(directory))
    return {name: tuple(entry.size) for name, entry in entries.items()}


def tensor_dtypes(directory: Path) -> dict[str, torch.dtype]:
    """Stored dtype of every tensor by key; reads no tensor."""
    entries = stored_tensors(read_metadata(directory))
    return {name: entry.properties.dtype for name, entry in entries.items()}


def _prepare(directory: Path, temporary: Path) -> None:
    """An empty temporary folder; refuses to replace what is not a checkpoint."""
    if directory.exists() and not _may_replace(directory):
        raise ValueError(f"{directory} must be new, empty or an older checkpoint: it is neither")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def _may_replace(directory: Path) -> bool:
    if not directory.is_dir():
        return False
    if is_step_name(directory.name) or not any(directory.iterdir()):
        return True
    try:
        read_manifest(directory)
    except CheckpointError:
        return False
    return True


def _write(temporary: Path, tensors: Mapping[str, Any], mesh: Mesh | None) -> dict[str, FileFacts]:
    """Write all boxes; returns the facts of every rank's data files."""
    writer, planner = HashingWriter(temporary), BoxSavePlanner()
    if mesh is not None:
        dcp_save(dict(tensors), storage_writer=writer, planner=planner, process_group=mesh.group)
        parts = mesh.gather(writer.files)
        return {name: facts for part in parts for name, facts in part.items()}
    with warnings.catch_warnings():
        # DCP wonders about a process on purpose without a process group. Filters belong to all
        # threads; what is saved in the background has a mesh.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp_save(dict(tensors), storage_writer=writer, planner=planner, no_dist=True)
    return writer.files


def _add(temporary: Path, add_files: AddFiles | None, written: dict[str, FileFacts]) -> None:
    """Let the caller add files, then hash and sync everything that DCP's writer did not."""
    if add_files is not None:
        add_files(temporary)
    for path in sorted(temporary.rglob("*")):
        name = path.relative_to(temporary).as_posix()
        if path.is_file() and name not in written:
            written[name] = file_facts(path)
            sync(path)
        elif path.is_dir():
            sync(path)


def _write_manifest(
    temporary: Path, manifest: Mapping[str, Any], written: Mapping[str, FileFacts]
) -> None:
    content = {
        "format_version": FORMAT_VERSION,
        "kind": KIND,
        **manifest,
        "files": {name: asdict(written[name]) for name in sorted(written)},
    }
    path = temporary / MANIFEST_NAME
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    sync(path)
    sync(temporary)


def _rename(temporary: Path, directory: Path) -> None:
    """Give the finished folder its name; an older one of that name goes after it."""
    replaced = directory.with_name(f".{directory.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if directory.exists():
        directory.rename(replaced)
    temporary.rename(directory)
    sync(directory.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _reason(error: BaseException) -> str:
    """The first lines of what went wrong, by rank, without tracebacks."""
    if isinstance(error, CheckpointException):
        return "; ".join(
            f"rank {rank}: {type(wrapped[0]).__name__}: {wrapped[0]}"
            for rank, wrapped in sorted(error.failures.items())
        )
    return str(error) if isinstance(error, RankError) else f"{type(error).__name__}: {error}"
