"""Who am I among how many: the mesh axes, and small values that ranks tell each other.

Works under a launcher, inside a process group that somebody else made (tests), and alone without
either. Knows nothing about models.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.axes import AXES, EXPERT_AXES, axis_sizes, expert_axis_sizes
from parallel.backend.base import Backend
from parallel.config import ParallelConfig
from parallel.process_group import join, place_of_launcher

Value = TypeVar("Value")


class RankError(RuntimeError):
    """Something failed on at least one rank; every rank raises the same message."""


@dataclass(frozen=True, slots=True)
class Place:
    """A rank's coordinates on the axes."""

    pp: int
    dp_replicate: int
    dp_shard: int
    tp: int


@dataclass(frozen=True, slots=True)
class Mesh:
    """This process's place. `device_mesh` has the axes `AXES`, `group` is that of all ranks.

    Parameters are sharded over dp_shard and replicated over dp_replicate; with shard=none that is
    all of dp. Data-parallel ranks see different rows, the others the same ones. `expert_mesh` has
    the axes `EXPERT_AXES`; None where experts lie like all else.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    device_mesh: DeviceMesh
    group: dist.ProcessGroup
    owns_process_group: bool
    expert_mesh: DeviceMesh | None = None

    @property
    def is_main(self) -> bool:
        """Whether this rank speaks for all."""
        return self.rank == 0

    @property
    def pp_rank(self) -> int:
        """Position on the pipeline axis."""
        return self._rank("pp")

    @property
    def pp_size(self) -> int:
        """Ranks that the layers are cut over."""
        return self._size("pp")

    @property
    def tp_rank(self) -> int:
        """Position on the tensor-parallel axis."""
        return self._rank("tp")

    @property
    def tp_size(self) -> int:
        """Ranks that heads, channels and vocabulary are cut over."""
        return self._size("tp")

    @property
    def dp_rank(self) -> int:
        """Position among the ranks that see different rows."""
        return self.replicate_rank * self.shard_size + self._rank("dp_shard")

    @property
    def dp_size(self) -> int:
        """Ranks that see different rows."""
        return self._size("dp_replicate") * self.shard_size

    @property
    def replicate_rank(self) -> int:
        """Which copy of the sharded parameters this rank has a part of."""
        return self._rank("dp_replicate")

    @property
    def shard_size(self) -> int:
        """Ranks that share out one copy of the parameters."""
        return self._size("dp_shard")

    @property
    def tp_group(self) -> dist.ProcessGroup:
        """The ranks of the tensor-parallel axis."""
        return self.device_mesh.get_group("tp")

    @property
    def pp_group(self) -> dist.ProcessGroup:
        """The ranks of the pipeline axis."""
        return self.device_mesh.get_group("pp")

    @property
    def ep_size(self) -> int:
        """Ranks that experts are cut over."""
        return 1 if self.expert_mesh is None else self.expert_mesh.size(EXPERT_AXES.index("ep"))

    @property
    def ep_rank(self) -> int:
        """Position among the ranks that experts are cut over."""
        return self.dp_rank % self.ep_size

    @property
    def ep_group(self) -> dist.ProcessGroup:
        """The ranks that share out one set of experts; only where there is such an axis."""
        assert self.expert_mesh is not None, "there is no expert-parallel axis"
        return self.expert_mesh.get_group("ep")

    @property
    def expert_replicate_rank(self) -> int:
        """Which copy of the sharded experts this rank has a part of."""
        if self.expert_mesh is None:
            return self.replicate_rank
        return int(self.expert_mesh.get_local_rank("edp_replicate"))

    @property
    def fsdp_mesh(self) -> DeviceMesh:
        """What parameters are sharded over, after the axis that they are replicated over."""
        if self._size("dp_replicate") > 1:
            return self.device_mesh["dp_replicate", "dp_shard"]
        return self.device_mesh["dp_shard"]

    @property
    def expert_fsdp_mesh(self) -> DeviceMesh:
        """The same for the parameters of this rank's experts."""
        if self.expert_mesh is None:
            return self.fsdp_mesh
        if self.expert_mesh.size(EXPERT_AXES.index("edp_replicate")) > 1:
            return self.expert_mesh["edp_replicate", "edp_shard"]
        return self.expert_mesh["edp_shard"]

    def place_of(self, rank: int) -> Place:
        """Coordinates of any rank."""
        found = (self.device_mesh.mesh == rank).nonzero()[0].tolist()
        return Place(*found)

    def ranks_at(self, *, pp: int, tp: int) -> list[int]:
        """The data-parallel ranks at one pp and tp coordinate, in order."""
        ranks: list[int] = self.device_mesh.mesh[pp, :, :, tp].flatten().tolist()
        return ranks

    def _rank(self, axis: str) -> int:
        return int(self.device_mesh.get_local_rank(axis))

    def _size(self, axis: str) -> int:
        return int(self.device_mesh.size(AXES.index(axis)))

    def gather(self, value: Value) -> list[Value]:
        """Small picklable values of all ranks, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def gather_numbers(self, values: Sequence[float]) -> list[list[float]]:
        """A few float64 numbers of all ranks, in rank order, on every rank."""
        row = torch.tensor(values, dtype=torch.float64)
        rows = [torch.empty_like(row) for _ in range(self.size)]
        if self.size == 1:
            rows = [row]
        else:
            dist.all_gather(rows, row, group=self.group)
        return [each.tolist() for each in rows]

    def broadcast(self, value: Value | None) -> Value:
        """Rank 0's value on every rank."""
        values: list[Any] = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0, group=self.group)
        result: Value = values[0]
        return result

    def on_own_group(self) -> Mesh:
        """This mesh with `group` a new gloo group of all ranks, for a thread's collectives."""
        return replace(self, group=dist.new_group(backend="gloo"))

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            self.gather(None)

    def agree(self, action: str, work: Callable[[], Value]) -> Value:
        """Do `work` on every rank and go on only if it succeeded on all.

        Raises:
            RankError: on every rank, naming `action`, each rank that failed and its error. Where
                all failed alike, each raises its own error.
        """
        result: Value | None = None
        problem: str | None = None
        cause: Exception | None = None
        try:
            result = work()
        except Exception as error:
            cause = error
            problem = f"{type(error).__name__}: {error}"
        problems = self.gather(problem)
        failed = [f"rank {rank}: {text}" for rank, text in enumerate(problems) if text is not None]
        if cause is not None and len(failed) == self.size and len(set(problems)) == 1:
            raise cause
        if failed:
            raise RankError(f"{action} failed on {'; '.join(failed)}") from cause
        return result  # type: ignore[return-value]  # no problem means that work returned


def agreed(mesh: Mesh | None, action: str, work: Callable[[], Value]) -> Value:
    """`Mesh.agree`, or `work` alone in a process that has no mesh."""
    return work() if mesh is None else mesh.agree(action, work)


def init(
    backend: Backend, config: ParallelConfig, *, environment: Mapping[str, str] | None = None
) -> Mesh:
    """Join the process group (or make one of size 1) and lay the mesh over it.

    `environment` is the launcher's (RANK, WORLD_SIZE, LOCAL_RANK), the process's own by default.

    Raises:
        ValueError: numbers that contradict each other or the layout, each naming what to change.
    """
    rank, size, local_rank = place_of_launcher(os.environ if environment is None else environment)
    owns = not dist.is_initialized()
    if not owns:
        rank, size = dist.get_rank(), dist.get_world_size()
    sizes = axis_sizes(config, size)
    device = backend.device(local_rank)
    if owns:
        join(backend.collective_backend, rank=rank, size=size, device=device)
    device_mesh = init_device_mesh(backend.device_type, sizes, mesh_dim_names=AXES)
    expert_mesh = None
    if config.ep > 1:
        expert_sizes = expert_axis_sizes(sizes, config.ep)
        expert_mesh = init_device_mesh(
            backend.device_type, expert_sizes, mesh_dim_names=EXPERT_AXES
        )
    assert dist.group.WORLD is not None
    return Mesh(
        rank=rank, size=size, local_rank=local_rank, device=device, device_mesh=device_mesh,
        group=dist.group.WORLD, owns_process_group=owns, expert_mesh=expert_mesh,
    )  # fmt: skip


def first_alone(world: Mesh) -> Mesh | None:
    """A mesh of rank 0 alone beside a larger one, None on the other ranks. Collective."""
    group = dist.new_group([0])
    only_rank_0 = torch.zeros((1,) * len(AXES), dtype=torch.int)
    device_mesh = DeviceMesh(world.device_mesh.device_type, only_rank_0, mesh_dim_names=AXES)
    if not world.is_main:
        return None
    return replace(
        world, size=1, device_mesh=device_mesh, group=group, owns_process_group=False,
        expert_mesh=None,
    )  # fmt: skip


def close(mesh: Mesh) -> None:
    """Leave the process group that `init` made; call it once, when all ranks are done."""
    if mesh.owns_process_group and dist.is_initialized():
        mesh.barrier()
        dist.destroy_process_group()
