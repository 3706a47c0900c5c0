"""What a config means for the engine: memory, peak."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.kernels import KernelSet, default_kernels
from parallel.backend.base import Memory
from parallel.backend.cpu import CpuBackend
from parallel.mesh import Mesh
from tests.training.tiny_run import tiny_run
from training.engine_setup import memory_bytes, throughput


class Device(CpuBackend):
    """A device that knows some of its figures."""

    def __init__(self, memory: Memory, peak: float | None) -> None:
        self._memory, self._peak = memory, peak

    def memory(self) -> Memory:
        return self._memory

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        assert dtype is torch.float32
        return self._peak

    def kernels(self) -> KernelSet:
        return default_kernels()


@pytest.mark.parametrize(
    ("memory", "expected"),
    [(Memory(3, 7, 9), 7), (Memory(3, None, 9), 3), (Memory(None, None, None), None)],
)
def test_memory_is_the_peak_where_the_device_knows_it(memory: Memory, expected: int | None) -> None:
    assert memory_bytes(Device(memory, None)) == expected


@pytest.mark.parametrize("peak", [None, 100.0])
def test_the_peak_is_that_of_all_ranks(peak: float | None) -> None:
    config = tiny_run(Path("prepared"), Path("run"))
    mesh = Mesh.__new__(Mesh)
    object.__setattr__(mesh, "size", 4)
    found = throughput(config, Device(Memory(None, None, None), peak), mesh)
    assert found.peak_flops == (None if peak is None else 400.0)
