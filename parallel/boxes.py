"""A rank's part of one global tensor: an axis-aligned box, in the words of torch's DCP.

A box says where its values lie; DCP asks through three methods whose names it fixes, and its
planners are told here how to find a box's values.
Knows nothing about files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor, Shard

from models.layers import ParamLayout


@dataclass(eq=False, slots=True)
class Box:
    """`local` holds the values of a global tensor from `offsets` on.

    An empty box (a rank that got no rows) writes and reads nothing. Boxes of several ranks that
    cover the same values are written once.
    """

    local: Tensor
    offsets: tuple[int, ...]
    global_shape: tuple[int, ...]

    @classmethod
    def whole(cls, tensor: Tensor) -> Box:
        """A box that is the tensor itself."""
        return cls(tensor, (0,) * tensor.dim(), tuple(tensor.shape))

    @property
    def slices(self) -> tuple[slice, ...]:
        """Where the box lies, as an index into the global tensor."""
        return tuple(
            slice(start, start + size)
            for start, size in zip(self.offsets, self.local.shape, strict=True)
        )

    def like(self, tensor: Tensor) -> Box:
        """The same place with other values (an optimizer's moments)."""
        return Box(tensor, self.offsets, self.global_shape)

    def fill(self, full: Tensor) -> None:
        """Copy this box's values out of the whole tensor, whatever its device and dtype.

        Raises:
            ValueError: a whole tensor of another shape.
        """
        if tuple(full.shape) != self.global_shape:
            raise ValueError(
                f"tensor shape {tuple(full.shape)} must equal {self.global_shape}: this is another "
                "model's tensor."
            )
        with torch.no_grad():
            self.local.copy_(full[self.slices])

    def size(self) -> torch.Size:
        """The global shape (DCP compares it with the stored one)."""
        return torch.Size(self.global_shape)

    def __create_write_items__(self, fqn: str, _object: Any) -> list[WriteItem]:
        return write_items(fqn, self.global_shape, self.offsets, self.local)

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        if self.local.numel() == 0:
            return []
        return [ChunkStorageMetadata(torch.Size(self.offsets), self.local.shape)]

    def __get_tensor_shard__(self, _index: MetadataIndex) -> Tensor:
        return self.local


@dataclass(eq=False, slots=True)
class LazyTensor:
    """A whole tensor that is made when it is written and forgotten right after.

    With `copies` it is that many equal parts side by side along `copies_dim`, and `load` makes one:
    they are written one by one.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]
    copies: int = 1
    copies_dim: int = 0

    def size(self) -> torch.Size:
        """The global shape."""
        return torch.Size(self.shape)

    def __create_write_items__(self, fqn: str, _object: Any) -> list[WriteItem]:
        stand_in = torch.empty(self._part_shape, dtype=self.dtype, device="meta")
        items = []
        for number in range(self.copies):
            offsets = [0] * len(self.shape)
            if self.copies > 1:
                offsets[self.copies_dim] = number * self._part_shape[self.copies_dim]
            items += write_items(fqn, self.shape, tuple(offsets), stand_in)
        return items

    def __get_tensor_shard__(self, _index: MetadataIndex) -> Tensor:
        tensor = self.load()
        if tuple(tensor.shape) != self._part_shape or tensor.dtype != self.dtype:
            raise ValueError(
                f"tensor {self.name} must be {self._part_shape} {self.dtype} as announced: got "
                f"{tuple(tensor.shape)} {tensor.dtype}."
            )
        return tensor

    @property
    def _part_shape(self) -> tuple[int, ...]:
        shape = list(self.shape)
        if self.copies > 1:
            shape[self.copies_dim] //= self.copies
        return tuple(shape)


class BoxSavePlanner(DefaultSavePlanner):
    """DCP's planner for states of boxes and lazy tensors (its own looks into tensors only)."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """This rank's values of one item, made now if they are lazy."""
        values: Tensor = self.state_dict[index.fqn].__get_tensor_shard__(index)
        return values


class BoxLoadPlanner(DefaultLoadPlanner):
    """The same for loading into boxes."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Take the state as it is; the default would replace values that are no tensors."""
        self.original_state_dict = state_dict
        self.state_dict = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Where the values of one item go."""
        values: Tensor = self.state_dict[index.fqn].__get_tensor_shard__(index)
        return values


def write_items(
    fqn: str, global_shape: tuple[int, ...], offsets: tuple[int, ...], local: Tensor
) -> list[WriteItem]:
    """What DCP writes for one box: one item, or none for an empty box."""
    if local.numel() == 0:
        return []
    data = TensorWriteData(
        chunk=ChunkStorageMetadata(torch.Size(offsets), local.shape),
        properties=TensorProperties(dtype=local.dtype),
        size=torch.Size(global_shape),
    )
    index = MetadataIndex(fqn, torch.Size(offsets))
    return [WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data)]


@dataclass(frozen=True, slots=True)
class Region:
    """Where this rank's part of one parameter lies: cut over tp and ep first, then over FSDP.

    `num_rows` of the local rows are the global tensor's; what follows is padding (of the
    vocabulary) that no checkpoint holds.
    """

    offsets: tuple[int, ...]
    global_shape: tuple[int, ...]
    num_rows: int

    def box(self, local: Tensor) -> Box:
        """The box of a local tensor, which may be a moment or a gradient; shares its memory."""
        return Box(local[: self.num_rows], self.offsets, self.global_shape)


def region_of(
    tensor: Tensor, layout: ParamLayout | None = None, *, tp_rank: int = 0, ep_rank: int = 0
) -> Region:
    """Where a parameter's local values belong; a plain tensor without a layout is whole.

    FSDP2 cuts one dim into equal pieces of `ceil(size / ranks)`, so that the last ranks may hold
    less or nothing.
    """
    shape, num_rows = list(tensor.shape), local_of(tensor).shape[0]
    offsets = _first_of_shard(tensor)
    if layout is None:
        return Region(tuple(offsets), tuple(shape), num_rows)
    for dim, rank in ((layout.tp_dim, tp_rank), (layout.ep_dim, ep_rank)):
        if dim is not None:
            offsets[dim] += rank * shape[dim]
    whole = layout.global_shape
    offsets[0] = min(offsets[0], whole[0])
    return Region(tuple(offsets), whole, min(num_rows, whole[0] - offsets[0]))


def local_of(tensor: Tensor) -> Tensor:
    """This rank's values of a parameter or gradient, sharing its memory."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    with torch.no_grad():
        local: Tensor = tensor.to_local()
    return local


def _first_of_shard(tensor: Tensor) -> list[int]:
    """Where the part begins that FSDP gave this rank, in the tensor that FSDP was given."""
    offsets = [0] * tensor.dim()
    if not isinstance(tensor, DTensor):
        return offsets
    for axis, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard):
            dim = placement.dim
            size = -(-tensor.shape[dim] // tensor.device_mesh.size(axis))
            first = min(tensor.device_mesh.get_local_rank(axis) * size, tensor.shape[dim])
            held = local_of(tensor).shape[dim]
            assert held == min(size, tensor.shape[dim] - first), (held, size, first)
            offsets[dim] = first
    return offsets
