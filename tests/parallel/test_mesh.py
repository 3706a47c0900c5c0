"""Who am I among how many: launcher variables, layouts, agreement, one process alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from parallel.backend.cpu import CpuBackend
from parallel.config import ParallelConfig, Shard
from parallel.mesh import Mesh, RankError, close, init
from tests.support.distributed import run_ranks


def test_one_process_needs_no_launcher() -> None:
    mesh = init(CpuBackend(), ParallelConfig(), environment={})
    try:
        assert (mesh.rank, mesh.size, mesh.dp_rank, mesh.dp_size) == (0, 1, 0, 1)
        assert (mesh.replicate_rank, mesh.shard_size) == (0, 1)
        assert mesh.is_main
        assert mesh.gather("x") == ["x"]
        assert mesh.broadcast(3) == 3
        assert mesh.gather_numbers((1.5, 2)) == [[1.5, 2.0]]
        mesh.barrier()
    finally:
        close(mesh)
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE must be set when RANK is: start through torchrun"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "RANK must be set when WORLD_SIZE, LOCAL_RANK is"),
        (
            {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
            r"RANK \(2\) must be from 0 to WORLD_SIZE - 1: got WORLD_SIZE 2",
        ),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "3"},
            r"LOCAL_RANK \(3\) must be from 0 to WORLD_SIZE - 1: got WORLD_SIZE 2",
        ),
    ],
)
def test_launcher_variables_that_contradict(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        init(CpuBackend(), ParallelConfig(), environment=environment)
    assert not dist.is_initialized()


def test_wrong_world_size_alone() -> None:
    with pytest.raises(ValueError, match=r"parallel\.dp \(2\) must equal .* got 1\. Start 2"):
        init(CpuBackend(), ParallelConfig(dp=2), environment={})
    assert not dist.is_initialized()


def two_ranks(rank: int, world_size: int) -> dict[str, object]:
    with pytest.raises(ValueError, match=r"parallel\.dp \(3\) must equal .* got 2\. Start 3"):
        init(CpuBackend(), ParallelConfig(dp=3))
    sharded = init(CpuBackend(), ParallelConfig(dp=2, shard=Shard.parameters))
    replicated = init(CpuBackend(), ParallelConfig(shard=Shard.none))
    mesh = sharded
    with pytest.raises(RankError, match="cutting failed on rank 1: OSError: rank 1 is full"):
        mesh.agree("cutting", lambda: _fail(mesh, only=1))
    with pytest.raises(OSError, match="every rank is full"):
        mesh.agree("cutting", lambda: _fail(mesh, only=None))
    return {
        "place": (mesh.rank, mesh.size, mesh.dp_rank, mesh.dp_size),
        "sharded": (sharded.replicate_rank, sharded.shard_size),
        "replicated": (replicated.replicate_rank, replicated.shard_size),
        "gathered": mesh.gather(rank * 10),
        "numbers": mesh.gather_numbers((0.1 + rank, rank)),
        "broadcast": mesh.broadcast("from 0" if rank == 0 else None),
        "agreed": mesh.agree("adding", lambda: rank + 1),
        "owns": mesh.owns_process_group,
    }


def _fail(mesh: Mesh, *, only: int | None) -> None:
    if only is None:
        raise OSError("every rank is full")
    if mesh.rank == only:
        raise OSError(f"rank {mesh.rank} is full")


def test_two_ranks(tmp_path: Path) -> None:
    for rank, result in enumerate(run_ranks(two_ranks, 2, tmp_path=tmp_path)):
        assert result["place"] == (rank, 2, rank, 2)
        assert result["sharded"] == (0, 2)
        assert result["replicated"] == (rank, 1)
        assert result["gathered"] == [0, 10]
        assert result["numbers"] == [[0.1, 0.0], [1.1, 1.0]]
        assert result["broadcast"] == "from 0"
        assert result["agreed"] == rank + 1
        assert result["owns"] is False


END = """
import sys, torch
from parallel.backend.cpu import CpuBackend
from parallel.config import ParallelConfig
from parallel.mesh import close, init
from parallel.process_group import end_process
mesh = init(CpuBackend(), ParallelConfig())
sys.stdout.write(f"rank {mesh.rank} of {mesh.size}\\n")
close(mesh)
end_process(int(sys.argv[1]))
sys.stdout.write("never")
"""


@pytest.mark.parametrize("status", [0, 3])
def test_end_process_flushes_and_leaves_with_its_status(status: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", END, str(status)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""},
    )
    assert (done.returncode, done.stdout) == (status, "rank 0 of 1\n"), done.stderr


def test_the_device_is_the_backends() -> None:
    mesh = init(CpuBackend(), ParallelConfig(), environment={})
    try:
        assert mesh.device == torch.device("cpu")
    finally:
        close(mesh)
