"""Folders of checkpoints: names, manifests, which is complete, which may go.

A checkpoint is complete when its folder has its final name: everything is written under a temporary
one and renamed. Damage that comes later is found by the sizes and hashes in `manifest.json`.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

from parallel.checkpoint_files import file_facts
from parallel.mesh import Mesh, agreed
from parallel.safe_metadata import FILE_NAME as METADATA_NAME

logger = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
KIND = "synfire"
_STEP = re.compile(r"step_\d{8}")
_LEFTOVER = re.compile(r"\.step_\d{8}\.(partial|replaced|removed)")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message says what to do."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint whose files are not what its manifest says."""


def step_directory(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read `manifest.json`.

    Raises:
        CheckpointError: no such checkpoint, or one of another program or a newer format.
        DamagedCheckpointError: a manifest that cannot be read.
    """
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise CheckpointError(
            f"checkpoint ({directory}) must be a folder with {MANIFEST_NAME}: got "
            f"{'a folder without it' if directory.is_dir() else 'nothing there'}. Name a run "
            "folder, one checkpoint, or a Hugging Face folder."
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files = manifest["files"]
        kind, version = manifest["kind"], int(manifest["format_version"])
        {name: (fact["sha256"], fact["bytes"]) for name, fact in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(
            f"checkpoint ({directory}) has a damaged {MANIFEST_NAME}: {error}."
        ) from error
    if kind != KIND or version > FORMAT_VERSION:
        raise CheckpointError(
            f"checkpoint ({directory}) must be of kind {KIND} and format {FORMAT_VERSION} or "
            f"older: got {kind}, format {version}. Read it with the release that wrote it."
        )
    result: dict[str, Any] = manifest
    return result


def verify(directory: Path, *, mesh: Mesh | None = None) -> None:
    """Compare every file with the manifest; ranks share the hashing out.

    Raises:
        DamagedCheckpointError: naming each file that is missing, cut short or changed.
    """
    rank, size = (mesh.rank, mesh.size) if mesh is not None else (0, 1)

    def look() -> list[str]:
        files: dict[str, dict[str, Any]] = read_manifest(directory)["files"]
        found = [_problem(directory / name, files[name]) for name in sorted(files)[rank::size]]
        if METADATA_NAME not in files:
            found.append(f"{METADATA_NAME} is not in the manifest")
        return [problem for problem in found if problem is not None]

    problems = agreed(mesh, f"checking {directory}", look)
    if mesh is not None:
        problems = [problem for part in mesh.gather(problems) for problem in part]
    if problems:
        raise DamagedCheckpointError(
            f"checkpoint ({directory}) is damaged: {'; '.join(dict.fromkeys(problems))}."
        )


def newest_complete(
    run_dir: Path, *, mesh: Mesh | None = None, check_files: bool = True
) -> Path | None:
    """The newest undamaged checkpoint of a run, or None when there is none at all.

    Damaged ones are named in the log and passed over. Without `check_files` only manifests are
    read, which finds no damage in the data.

    Raises:
        CheckpointError: there are checkpoints and every one of them is damaged.
    """
    names = agreed(mesh, f"looking into {run_dir}", lambda: _step_names(run_dir))
    if mesh is not None:
        names = mesh.broadcast(names)
    for name in reversed(names):
        directory = run_dir / "checkpoints" / name
        try:
            if check_files:
                verify(directory, mesh=mesh)
            else:
                read_manifest(directory)
        except CheckpointError as error:
            if mesh is None or mesh.is_main:
                logger.warning("%s It is passed over; the one before it is tried.", error)
            continue
        return directory
    if names:
        raise CheckpointError(
            f"run_dir ({run_dir}) must hold an undamaged checkpoint: all {len(names)} are damaged. "
            "Start in another run_dir, or move these away to begin at step 0."
        )
    return None


def set_aside(run_dir: Path, *, after_step: int) -> list[Path]:
    """Rename the checkpoints beyond the step that a run goes on from, which are damaged.

    They keep their content as `damaged_<name>` and are never looked at again: one that became
    readable later would belong to steps that were trained twice. Call it on one rank.
    """
    folder = run_dir / "checkpoints"
    moved = []
    for name in _step_names(run_dir):
        if _step_of(name) > after_step:
            target = folder / f"damaged_{name}"
            shutil.rmtree(target, ignore_errors=True)
            moved.append((folder / name).rename(target))
    return moved


def prune(run_dir: Path, *, keep_last: int, keep_every_steps: int | None = None) -> None:
    """Remove old checkpoints and what interrupted saves left behind.

    The newest `keep_last` stay, and all whose step is a multiple of `keep_every_steps`. Call it on
    one rank, after a successful save.

    Raises:
        ValueError: `keep_last` below 1.
    """
    if keep_last < 1:
        raise ValueError(f"checkpoint.keep_last ({keep_last}) must be at least 1.")
    folder = run_dir / "checkpoints"
    for name in _step_names(run_dir)[:-keep_last]:
        if keep_every_steps is not None and _step_of(name) % keep_every_steps == 0:
            continue
        # Renamed first, so that a half-removed folder is never taken for a checkpoint.
        removed = folder / f".{name}.removed"
        (folder / name).rename(removed)
    for path in folder.iterdir() if folder.is_dir() else ():
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def is_step_name(name: str) -> bool:
    """Whether a folder name is one that a run gives its checkpoints."""
    return _STEP.fullmatch(name) is not None


def _step_names(run_dir: Path) -> list[str]:
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if is_step_name(path.name))


def _step_of(name: str) -> int:
    return int(name.removeprefix("step_"))


def _problem(path: Path, expected: dict[str, Any]) -> str | None:
    """What is wrong with one file, None when nothing is."""
    if not path.is_file():
        return f"{path.name} is missing"
    size = path.stat().st_size
    if size != expected["bytes"]:
        return f"{path.name} has {size} bytes instead of {expected['bytes']}"
    if file_facts(path).sha256 != expected["sha256"]:
        return f"{path.name} has other contents (sha256)"
    return None
