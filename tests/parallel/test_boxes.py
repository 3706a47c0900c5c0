"""Boxes: where values lie, what DCP is told about them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from parallel.boxes import Box, LazyTensor, local_of, region_of
from parallel.checkpoint import read_tensors, save_streamed


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


@pytest.mark.parametrize("dim", [0, 1])
def test_copies_of_a_lazy_tensor_are_written_one_by_one(dim: int, tmp_path: Path) -> None:
    shape = [2, 3]
    shape[dim] *= 3
    made: list[int] = []

    def part() -> torch.Tensor:
        made.append(1)
        return torch.arange(6.0).view(2, 3)

    lazy = LazyTensor("w", tuple(shape), torch.float32, part, copies=3, copies_dim=dim)
    items = lazy.__create_write_items__("w", lazy)
    assert [item.index.offset[dim] for item in items] == [0, shape[dim] // 3, shape[dim] // 3 * 2]
    save_streamed(tmp_path / "out", [lazy], {})
    assert len(made) == 3
    ((_, found),) = read_tensors(tmp_path / "out")
    assert torch.equal(found, torch.cat([torch.arange(6.0).view(2, 3)] * 3, dim=dim))
    wrong = LazyTensor("w", (4, 3), torch.float32, lambda: torch.zeros(4, 3), copies=2)
    with pytest.raises(ValueError, match=r"w must be \(2, 3\) .* as announced: got \(4, 3\)"):
        wrong.__get_tensor_shard__(MetadataIndex("w"))
