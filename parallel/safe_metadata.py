"""DCP's pickled `.metadata`, read as data: only its own plain classes, nothing that runs.

`torch.distributed.checkpoint` reads that file with a bare unpickler, which executes whatever a
hostile file asks for. This one admits a fixed list and then checks what came out.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

FILE_NAME = ".metadata"


class UnsafeMetadataError(ValueError):
    """A `.metadata` that holds something else than the description of tensors."""


def _layout(name: str) -> torch.layout:
    """torch pickles a layout as a call with its name; only the dense one is ours."""
    if name != "torch.strided":
        raise UnsafeMetadataError(f"layout ({name}) must be torch.strided.")
    return torch.strided


_ALLOWED: dict[tuple[str, str], Any] = {
    **{
        (owner.__module__, owner.__name__): owner
        for owner in (
            metadata.Metadata,
            metadata.TensorStorageMetadata,
            metadata.ChunkStorageMetadata,
            metadata.TensorProperties,
            metadata.MetadataIndex,
            metadata.StorageMeta,
            metadata._MEM_FORMAT_ENCODING,
            filesystem._StorageInfo,
        )
    },
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _layout,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = _ALLOWED.get((module, name))
        if found is None and module == "torch":
            candidate = getattr(torch, name, None)
            found = candidate if isinstance(candidate, torch.dtype) else None
        if found is None:
            raise UnsafeMetadataError(f"it asks for {module}.{name}")
        return found


def read_metadata(directory: Path) -> Metadata:
    """Read and check `<directory>/.metadata`.

    Raises:
        UnsafeMetadataError: anything but DCP's description of tensors; nothing was executed.
        FileNotFoundError: no such file.
    """
    path = directory / FILE_NAME
    with path.open("rb") as file:
        try:
            found = _Unpickler(file).load()
            _check(found)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise UnsafeMetadataError(
                f"{path} must hold only torch's description of tensors: {error}. It was not "
                "executed. Do not use this checkpoint; take another one or a trusted copy."
            ) from error
    result: Metadata = found
    return result


def stored_tensors(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    """The entries of a metadata that `read_metadata` returned: shape, dtype and boxes by key."""
    return cast(dict[str, TensorStorageMetadata], metadata.state_dict_metadata)


def _check(found: Any) -> None:
    """Refuse values of the right classes in the wrong places."""
    if not isinstance(found, Metadata):
        raise UnsafeMetadataError(f"it is a {type(found).__name__}")
    for name, entry in found.state_dict_metadata.items():
        if not isinstance(name, str) or not isinstance(entry, TensorStorageMetadata):
            raise UnsafeMetadataError(f"{name!r} is no tensor")
        if not isinstance(entry.properties.dtype, torch.dtype):
            raise UnsafeMetadataError(f"{name!r} has no dtype")
    for index, place in (found.storage_data or {}).items():
        if not isinstance(index, MetadataIndex) or not isinstance(place, filesystem._StorageInfo):
            raise UnsafeMetadataError(f"{index!r} has no place")
        if Path(place.relative_path).name != place.relative_path:
            raise UnsafeMetadataError(f"{index.fqn!r} lies outside the folder")
        if place.transform_descriptors:
            raise UnsafeMetadataError(f"{index.fqn!r} is transformed")
