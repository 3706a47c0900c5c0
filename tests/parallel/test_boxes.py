"""Boxes: where values lie, what DCP is told about them."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from parallel.boxes import Box, LazyTensor, local_of, region_of


def test_a_plain_tensor_is_its_own_box_and_shares_memory() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3, 2))
    box = region_of(parameter).box(local_of(parameter))
    box.fill(torch.arange(6.0).view(3, 2))
    assert box.offsets == (0, 0)
    assert parameter.tolist() == [[0, 1], [2, 3], [4, 5]]


def test_fill_takes_the_boxes_part_and_converts() -> None:
    local = torch.zeros(2, 1, dtype=torch.float64)
    box = Box(local, (1, 2), (4, 3))
    box.fill(torch.arange(12, dtype=torch.float32).view(4, 3))
    assert local.tolist() == [[5.0], [8.0]]
    assert box.slices == (slice(1, 3), slice(2, 3))


def test_fill_refuses_another_shape() -> None:
    box = Box(torch.zeros(2, 3), (0, 0), (4, 3))
    with pytest.raises(ValueError, match=r"shape \(3, 4\) must equal \(4, 3\)"):
        box.fill(torch.zeros(3, 4))


def test_an_empty_box_writes_and_reads_nothing() -> None:
    box = Box(torch.zeros(0, 3), (4, 0), (4, 3))
    assert box.__create_write_items__("w", box) == []
    assert box.__create_chunk_list__() == []


def test_items_carry_place_shape_and_dtype() -> None:
    box = Box(torch.zeros(2, 3, dtype=torch.bfloat16), (2, 0), (4, 3))
    (item,) = box.__create_write_items__("w", box)
    assert item.tensor_data is not None
    assert item.index.offset == torch.Size([2, 0])
    assert item.tensor_data.size == torch.Size([4, 3])
    assert item.tensor_data.chunk.sizes == torch.Size([2, 3])
    assert item.tensor_data.properties.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "made", [torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.float64)], ids=["shape", "dtype"]
)
def test_a_lazy_tensor_must_be_what_it_announced(made: torch.Tensor) -> None:
    lazy = LazyTensor("w", (2, 3), torch.float32, lambda: made)
    with pytest.raises(ValueError, match=r"w must be \(2, 3\) torch.float32 as announced: got"):
        lazy.__get_tensor_shard__(MetadataIndex("w"))
