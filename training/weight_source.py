"""Named weights somewhere on disk, looked at without loading: one interface, three kinds of folder.

A Synfire checkpoint, a run folder (its newest complete checkpoint) or a Hugging Face folder.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from torch import Tensor

from data.tokenizer import load_tokenizer
from models.config import ModelConfig
from models.conversion.convert import plan_conversion
from models.conversion.huggingface import SafetensorsFolder
from models.conversion.source_config import read_config, read_format
from parallel import checkpoint
from parallel.mesh import Mesh, agreed

logger = logging.getLogger(__name__)

MODEL = "model/"
DATA = ".distcp"


@dataclass(frozen=True, slots=True)
class WeightSource:
    """Named weights somewhere on disk.

    `manifest` is a Synfire checkpoint's, None for a Hugging Face folder. `tokenizer_folder` and
    `tokenizer_sha256` are None when no tokenizer lies beside the weights. `new_parameters` are the
    names that conversion added. `fingerprint` gives what changes with the weights; `format` is the
    base's, as far as anyone wrote it down.
    """

    path: Path
    fingerprint: Callable[[], str]
    format: str | None
    model: ModelConfig
    manifest: Mapping[str, Any] | None
    shapes: Mapping[str, tuple[int, ...]]
    tokenizer_folder: Path | None
    tokenizer_sha256: str | None
    new_parameters: tuple[str, ...]
    read: Callable[[Collection[str]], Iterator[tuple[str, Tensor]]]

    def identity(self) -> dict[str, Any]:
        """What a run notes about the weights that it began with."""
        return {"path": str(self.path), "fingerprint": self.fingerprint(), "format": self.format}


def open_weights(
    path: str | Path,
    *,
    key: str = "checkpoint",
    mesh: Mesh | None = None,
    check_files: bool = True,
) -> WeightSource:
    """Look at a run folder, a checkpoint or a Hugging Face folder without loading weights.

    Args:
        path: the folder; of a run, its newest complete checkpoint is taken.
        key: what the folder is called in the config, for errors.
        mesh: ranks that open it together, take the same checkpoint and share its hashing out.
        check_files: compare a Synfire checkpoint with its hashes. A Hugging Face folder has none.

    Raises:
        ValueError: nothing of the three, or a run folder without a complete checkpoint.
        CheckpointError: a damaged checkpoint.
        RankError: a folder that some ranks cannot read.
    """
    folder = Path(path)
    action = f"opening {key} ({folder})"
    kind = agreed(mesh, action, lambda: _kind_of(folder, key))
    if kind is _Kind.run:
        newest = checkpoint.newest_complete(folder, mesh=mesh, check_files=check_files)
        if newest is None:
            raise ValueError(
                f"{key} ({folder}) must hold a complete checkpoint: got none under "
                f"{_checkpoints_of(folder)}. Train longer, or give another folder."
            )
        folder = newest
    elif kind is _Kind.checkpoint and check_files:
        checkpoint.verify(folder, mesh=mesh)
    read = _hugging_face if kind is _Kind.hugging_face else _synfire
    return agreed(mesh, action, lambda: read(folder))


def kept_checkpoint(path: str | Path, identity: Mapping[str, Any]) -> Path | None:
    """The checkpoint of a run folder that had this identity, newest or not; None if it is gone."""
    folder = _checkpoints_of(Path(path)) / Path(identity["path"]).name
    try:
        found = open_weights(folder, check_files=False).fingerprint()
    except (ValueError, OSError, checkpoint.CheckpointError):
        return None
    return folder if found == identity["fingerprint"] else None


class _Kind(Enum):
    run = "run"
    checkpoint = "checkpoint"
    hugging_face = "hugging_face"


def _kind_of(folder: Path, key: str) -> _Kind:
    if not folder.is_dir():
        raise ValueError(
            f"{key} ({folder}) must be a folder: got nothing there. Give a run folder, one "
            "checkpoint or a Hugging Face folder."
        )
    if _checkpoints_of(folder).is_dir():
        return _Kind.run
    if (folder / "manifest.json").is_file():
        return _Kind.checkpoint
    if (folder / "config.json").is_file():
        return _Kind.hugging_face
    raise ValueError(
        f"{key} ({folder}) must be a run folder (checkpoints/), a Synfire checkpoint "
        "(manifest.json) or a Hugging Face folder (config.json): got none of them."
    )


def _checkpoints_of(run_dir: Path) -> Path:
    return checkpoint.step_directory(run_dir, 0).parent


def _synfire(folder: Path) -> WeightSource:
    manifest = checkpoint.read_manifest(folder)
    if "model" not in manifest:
        raise ValueError(
            f"checkpoint ({folder}) must be a Synfire checkpoint: its manifest.json has no model. "
            "Give a run folder, one checkpoint or a Hugging Face folder."
        )
    shapes = {
        name.removeprefix(MODEL): shape
        for name, shape in checkpoint.tensor_shapes(folder).items()
        if name.startswith(MODEL)
    }

    def read(names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        wanted = [MODEL + name for name in names]
        for name, tensor in checkpoint.read_tensors(folder, wanted):
            yield name.removeprefix(MODEL), tensor

    # Conversion copies tokenizer files that nobody can load too; the manifest names the loadable.
    tokenizer = manifest.get("tokenizer")
    tokenizer_folder = folder / "tokenizer"
    hashes = [
        fact["sha256"] for name, fact in sorted(manifest["files"].items()) if name.endswith(DATA)
    ]
    # Conversion notes its source, training what it began with.
    base = manifest.get("source") or manifest.get("weights") or {}
    return WeightSource(
        path=folder,
        fingerprint=lambda: hashlib.sha256("".join(hashes).encode()).hexdigest(),
        format=base.get("format"),
        model=TypeAdapter(ModelConfig).validate_python(manifest["model"]),
        manifest=manifest,
        shapes=shapes,
        tokenizer_folder=tokenizer_folder if tokenizer_folder.is_dir() else None,
        tokenizer_sha256=None if tokenizer is None else str(tokenizer["sha256"]),
        new_parameters=tuple(manifest.get("new_parameters", ())),
        read=read,
    )


def _hugging_face(folder: Path) -> WeightSource:
    source = SafetensorsFolder(folder)
    model = read_config(source.config)
    planned = {tensor.name: tensor for tensor in plan_conversion(source, model)}

    def read(names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            yield name, planned[name].load()

    try:
        tokenizer = load_tokenizer(folder)
    except ValueError as error:
        logger.warning("%s", error)
        tokenizer = None
    return WeightSource(
        path=folder,
        fingerprint=source.fingerprint,
        format=read_format(source.config).value,
        model=model,
        manifest=None,
        shapes={name: tensor.shape for name, tensor in planned.items()},
        tokenizer_folder=None if tokenizer is None else folder,
        tokenizer_sha256=None if tokenizer is None else tokenizer.sha256,
        new_parameters=(),
        read=read,
    )
