"""Where a run's first weights come from, and proof that every one of them is accounted for.

Reads a Synfire checkpoint, a run folder (its newest complete checkpoint) or a Hugging Face folder
through one `WeightSource`; moves weights only, never optimizer state.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
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
from parallel.boxes import Box
from parallel.mesh import Mesh
from training.config import InitConfig

logger = logging.getLogger(__name__)

MODEL = "model/"
DATA = ".distcp"
IGNORED_DIFFERENCES = ("max_position_embeddings", "bos_token_id", "eos_token_id")


@dataclass(frozen=True, slots=True)
class WeightSource:
    """Named weights somewhere on disk.

    `manifest` is a Synfire checkpoint's, None for a Hugging Face folder. `tokenizer_folder` and
    `tokenizer_sha256` are None when no tokenizer lies beside the weights. `new_parameters` are the
    names that conversion added. `fingerprint` changes with the weights; `format` is the base's, as
    far as anyone wrote it down.
    """

    path: Path
    fingerprint: str
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
        return {"path": str(self.path), "fingerprint": self.fingerprint, "format": self.format}


@dataclass(frozen=True, slots=True)
class WeightReport:
    """What became of every name: loaded, new in the model, unused from the source."""

    loaded: tuple[str, ...]
    new: tuple[str, ...]
    unused: tuple[str, ...]

    def describe(self) -> str:
        """One line for the log."""
        parts = [f"{len(self.loaded)} loaded"]
        for word, names in (("new", self.new), ("unused", self.unused)):
            parts.append(f"{len(names)} {word}" + (f" ({', '.join(names)})" if names else ""))
        return ", ".join(parts)


def open_weights(
    path: str | Path, *, mesh: Mesh | None = None, check_files: bool = True
) -> WeightSource:
    """Look at a run folder, a checkpoint or a Hugging Face folder without loading weights.

    Args:
        path: the folder; of a run, its newest complete checkpoint is taken.
        mesh: ranks that open it together, take the same checkpoint and share its hashing out.
        check_files: compare a Synfire checkpoint with its hashes. A Hugging Face folder has none.

    Raises:
        ValueError: nothing of the three, or a run folder without a complete checkpoint.
        CheckpointError: a damaged checkpoint.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(
            f"checkpoint ({folder}) must be a folder: got nothing there. Give a run folder, one "
            "checkpoint or a Hugging Face folder."
        )
    checkpoints = checkpoint.step_directory(folder, 0).parent
    if checkpoints.is_dir():
        newest = checkpoint.newest_complete(folder, mesh=mesh, check_files=check_files)
        if newest is None:
            raise ValueError(
                f"checkpoint ({folder}) must hold a complete checkpoint: got none under "
                f"{checkpoints}. Train longer, or give another folder."
            )
        return _synfire(newest)
    if (folder / "manifest.json").is_file():
        if check_files:
            checkpoint.verify(folder, mesh=mesh)
        return _synfire(folder)
    if (folder / "config.json").is_file():
        return _hugging_face(folder)
    raise ValueError(
        f"checkpoint ({folder}) must be a run folder (checkpoints/), a Synfire checkpoint "
        "(manifest.json) or a Hugging Face folder (config.json): got none of them."
    )


def match_weights(
    shapes: Mapping[str, tuple[int, ...]], source: WeightSource, config: InitConfig
) -> WeightReport:
    """Compare the model's names and shapes with the source's; loads nothing.

    Every name that is only on one side needs an explanation: a pattern of `init.new` or
    `init.unused`.

    Raises:
        ValueError: an unexplained name, or a shape mismatch with both numbers.
    """
    loaded = tuple(name for name in shapes if name in source.shapes)
    new = tuple(name for name in shapes if name not in source.shapes)
    unused = tuple(name for name in source.shapes if name not in shapes)
    for name in loaded:
        if shapes[name] != source.shapes[name]:
            raise ValueError(
                f"{name} {source.shapes[name]} of {source.path} must have the model's shape: got "
                f"{shapes[name]}. Choose the model= that the checkpoint was made for."
            )
    _explain(new, config.new, key="init.new", where="the model", absent=str(source.path))
    _explain(unused, config.unused, key="init.unused", where=str(source.path), absent="the model")
    return WeightReport(loaded, new, unused)


def load_weights(
    boxes: Mapping[str, Box], source: WeightSource, config: InitConfig
) -> WeightReport:
    """Fill this rank's boxes from the source; new parameters keep their initial values.

    Raises:
        ValueError: as `match_weights`.
    """
    shapes = {name: box.global_shape for name, box in boxes.items()}
    report = match_weights(shapes, source, config)
    for name, tensor in source.read(report.loaded):
        boxes[name].fill(tensor)
    return report


def warn_of_differences(model: ModelConfig, source: WeightSource) -> list[str]:
    """Name every model setting that differs from the source's and that no shape would show."""
    lines = []
    for field in dataclasses.fields(ModelConfig):
        ours, theirs = getattr(model, field.name), getattr(source.model, field.name)
        if ours != theirs and field.name not in IGNORED_DIFFERENCES:
            lines.append(f"model.{field.name} ({ours}) is {theirs} in {source.path}")
    for line in lines:
        logger.warning("%s: the loaded model will compute something else.", line)
    return lines


def check_same_tokenizer(
    checkpoint_path: str | Path, checkpoint_sha256: str | None, data_sha256: str
) -> None:
    """Refuse a checkpoint on data of other token ids; warn when nobody can tell.

    Raises:
        ValueError: both hashes.
    """
    if checkpoint_sha256 is None:
        logger.warning(
            "%s has no tokenizer: nobody can check that the data was encoded for it.",
            checkpoint_path,
        )
    elif checkpoint_sha256 != data_sha256:
        raise ValueError(
            f"tokenizer of the data (sha256 {data_sha256[:12]}) must be the checkpoint's: got "
            f"{checkpoint_sha256[:12]} in {checkpoint_path}. Prepare the data with the "
            "checkpoint's tokenizer (launch.prepare tokenizer=...), or use another checkpoint."
        )


def _explain(
    names: Sequence[str], patterns: Sequence[str], *, key: str, where: str, absent: str
) -> None:
    unexplained = [
        name for name in names if not any(fnmatchcase(name, pattern) for pattern in patterns)
    ]
    if unexplained:
        rest = f" and {len(unexplained) - 3} more" if len(unexplained) > 3 else ""
        raise ValueError(
            f"{key} ({list(patterns)}) must explain every parameter of {where} that {absent} does "
            f"not have: got {', '.join(unexplained[:3])}{rest}. Choose the model= that the "
            "checkpoint was made for, convert it (launch.convert), or add a pattern."
        )


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
        fingerprint=hashlib.sha256("".join(hashes).encode()).hexdigest(),
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
        fingerprint=source.fingerprint(),
        format=read_format(source.config).value,
        model=model,
        manifest=None,
        shapes={name: tensor.shape for name, tensor in planned.items()},
        tokenizer_folder=None if tokenizer is None else folder,
        tokenizer_sha256=None if tokenizer is None else tokenizer.sha256,
        new_parameters=(),
        read=read,
    )
