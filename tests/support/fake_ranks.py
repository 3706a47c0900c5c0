"""One rank among many that do not exist: torch's `fake` process group, which moves nothing.

For what is decided before anything is communicated: places, groups, shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch.distributed as dist
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from parallel.backend.cpu import CpuBackend
from parallel.config import ParallelConfig
from parallel.mesh import Mesh, init


class FakeBackend(CpuBackend):
    """The processor, with collectives that return at once and move nothing."""

    collective_backend: ClassVar[str] = "fake"


@contextmanager
def fake_mesh(parallel: ParallelConfig, *, rank: int, world_size: int) -> Iterator[Mesh]:
    """The mesh that `rank` of `world_size` would have under a launcher."""
    environment = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank % 8)}
    if world_size < 8:
        environment["LOCAL_RANK"] = str(rank)
    try:
        yield init(FakeBackend(), parallel, environment=environment)
    finally:
        # Nobody else is there to wait for, as `close` would.
        if dist.is_initialized():
            dist.destroy_process_group()
        # Meshes of two ranks are equal to torch, which would hand out the groups of the first.
        _clear_sharding_prop_cache()
