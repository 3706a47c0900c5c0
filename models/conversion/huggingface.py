"""Hugging Face folders on disk: config, tokenizer files, safetensors tensor by tensor.

Knows file layouts only; what names and keys mean is in `weight_map` and `source_config`. Reading
maps files (no anonymous memory); writing holds one tensor at a time whatever the shard size.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip

SAMPLED = 512
"""Elements at either end of a tensor that a fingerprint reads."""

DTYPE_NAMES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_NAME_OF_DTYPE = {dtype: name for name, dtype in DTYPE_NAMES.items()}


class TensorSource(Protocol):
    """Named tensors that are loaded one by one, with a Hugging Face config beside them."""

    @property
    def config(self) -> dict[str, Any]:
        """The parsed config.json."""

    def names(self) -> tuple[str, ...]:
        """Every tensor name."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape without loading."""

    def dtype(self, name: str) -> torch.dtype:
        """Dtype without loading."""

    def load(self, name: str) -> Tensor:
        """The tensor; do not write into it."""


class SafetensorsFolder:
    """A folder with config.json and one or many safetensors shards, read lazily.

    Raises:
        ValueError: a missing file, a truncated shard, an index that disagrees with its shards.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config: dict[str, Any] = read_json(self.path / CONFIG)
        self._handles: dict[str, Any] = {}
        self._file_of = self._open_shards()

    def names(self) -> tuple[str, ...]:
        """Every tensor name, in the order of the shards."""
        return tuple(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape without loading."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Dtype without loading.

        Raises:
            ValueError: an integer or 8-bit tensor (a quantised checkpoint).
        """
        stored = self._slice(name).get_dtype()
        if stored not in DTYPE_NAMES:
            raise ValueError(
                f"{self.path} tensor {name} ({stored}) must be one of {', '.join(DTYPE_NAMES)}. "
                "Use a checkpoint that is not quantised."
            )
        return DTYPE_NAMES[stored]

    def load(self, name: str) -> Tensor:
        """The tensor as a view of the mapped file; do not write into it."""
        tensor = self._handles[self._file_of[name]].get_tensor(name)
        assert isinstance(tensor, Tensor)
        return tensor

    def fingerprint(self) -> str:
        """SHA-256 over the config and both ends of every tensor: changes with any training.

        Reads kilobytes a tensor, so it costs nothing beside loading; it is no proof against a
        damaged middle.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name in sorted(self.names()):
            flat = self.load(name).reshape(-1)
            digest.update(f"{name} {self.shape(name)} {flat.dtype}".encode())
            for part in (flat[:SAMPLED], flat[-SAMPLED:]):
                digest.update(part.clone().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _slice(self, name: str) -> Any:
        return self._handles[self._file_of[name]].get_slice(name)

    def _open_shards(self) -> dict[str, str]:
        if (self.path / INDEX).exists():
            listed = read_json(self.path / INDEX).get("weight_map")
            if not isinstance(listed, dict) or not listed:
                raise ValueError(f"{self.path / INDEX} must have a weight_map. Fetch it again.")
            return self._check_index({str(k): str(v) for k, v in listed.items()})
        if not (self.path / SINGLE).exists():
            raise ValueError(
                f"source ({self.path}) must hold {SINGLE} or {INDEX}: neither is there. "
                "Convert other weight formats to safetensors first."
            )
        return dict.fromkeys(self._open(SINGLE), SINGLE)

    def _check_index(self, listed: dict[str, str]) -> dict[str, str]:
        found: dict[str, str] = {}
        for file in sorted(set(listed.values())):
            if Path(file).name != file:
                raise ValueError(f"{INDEX} file ({file}) must be a plain file name in its folder.")
            found.update(dict.fromkeys(self._open(file), file))
        for name in sorted(found.keys() ^ listed.keys()):
            where = "the index but in no shard" if name in listed else f"{found[name]} only"
            raise ValueError(
                f"{self.path / INDEX} must list exactly the tensors of its shards: {name} is in "
                f"{where}. Fetch the folder again."
            )
        return found

    def _open(self, file: str) -> list[str]:
        path = self.path / file
        if not path.exists():
            raise ValueError(f"source ({self.path}) must hold every shard: {file} is missing.")
        try:
            self._handles[file] = safe_open(path, framework="pt", device="cpu")
        except SafetensorError as error:
            raise ValueError(
                f"shard {path} ({path.stat().st_size} bytes) is truncated or damaged: {error}. "
                "Fetch it again."
            ) from error
        return list(self._handles[file].keys())


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor to write: everything but its values is known before it is loaded."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_sharded(folder: Path, entries: Sequence[TensorEntry], *, max_shard_bytes: int) -> None:
    """Write `model*.safetensors` with an index when there is more than one shard.

    One tensor is in memory at a time. A tensor above `max_shard_bytes` gets its own shard.
    """
    shards: list[list[TensorEntry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.num_bytes
    if len(shards) == 1:
        _write_shard(folder / SINGLE, shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / file, shard)
        weight_map.update({entry.name: file for entry in shard})
    total = sum(entry.num_bytes for entry in entries)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def copy_tokenizer(source: Path, target: Path) -> tuple[str, ...]:
    """Copy the tokenizer files that exist; returns their names (empty: no tokenizer)."""
    found = tuple(name for name in TOKENIZER_FILES if (source / name).is_file())
    if found:
        target.mkdir(parents=True, exist_ok=True)
    for name in found:
        shutil.copyfile(source / name, target / name)
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: no such file, no JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"{path.parent} must hold {path.name}: there is no such file. Check the folder's name."
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be JSON: {error}. Fetch it again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must be a JSON object: got {type(value).__name__}.")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write readable JSON with a last newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_shard(path: Path, entries: Iterable[TensorEntry]) -> None:
    """Safetensors: header length (8 bytes), JSON header padded to 8 bytes, then the tensors.

    Wider dtypes come first, so that every tensor is aligned.
    """
    entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        end = offset + entry.num_bytes
        header[entry.name] = {
            "dtype": _NAME_OF_DTYPE[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for entry in entries:
            tensor = entry.load().detach().to(dtype=entry.dtype, device="cpu").contiguous()
            if tuple(tensor.shape) != entry.shape:
                raise ValueError(
                    f"tensor {entry.name} {tuple(tensor.shape)} must have the planned shape: "
                    f"got {entry.shape} in the plan."
                )
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
