"""Checkpoints over real ranks: resharding, empty shards, replicas, failures on one rank."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
from torch import Tensor

from parallel.backend.cpu import CpuBackend
from parallel.checkpoint import (
    Box,
    CheckpointError,
    load,
    newest_complete,
    read_manifest,
    read_tensors,
    save,
    step_directory,
    verify,
)
from parallel.config import ParallelConfig
from parallel.mesh import Mesh, init
from tests.support.distributed import run_ranks

ROWS = {"many": 11, "few": 3, "one": 1}


def whole(name: str) -> Tensor:
    generator = torch.Generator().manual_seed(len(name))
    return torch.randn(ROWS[name], 4, dtype=torch.float64, generator=generator)


def rows(name: str, rank: int, size: int) -> Box:
    """The rank's rows as FSDP2 cuts them: equal pieces, the last ones short or empty."""
    full = whole(name)
    step = -(-full.shape[0] // size)
    start = min(rank * step, full.shape[0])
    return Box(full[start : start + step].clone(), (start, 0), tuple(full.shape))


def quarter(rank: int) -> Box:
    """One of 2 x 2 boxes."""
    top, left = (rank // 2) * 6, (rank % 2) * 2
    box = Box(torch.empty(6 if top == 0 else 5, 2, dtype=torch.float64), (top, left), (11, 4))
    box.fill(whole("many"))
    return box


def sharded(rank: int, size: int) -> dict[str, Box]:
    return {name: rows(name, rank, size) for name in ROWS}


def check_loads(folder: Path, mesh: Mesh) -> None:
    targets = sharded(mesh.rank, mesh.size)
    for box in targets.values():
        box.local.fill_(torch.nan)
    load(folder, targets, mesh=mesh)
    for name, box in targets.items():
        assert torch.equal(box.local, whole(name)[box.slices]), name


def four_ranks(rank: int, world_size: int, folder: Path) -> None:
    mesh = init(CpuBackend(), ParallelConfig())
    save(folder / "rows4", sharded(rank, 4), {"step": 1}, mesh=mesh)
    save(folder / "quarters", {"many": quarter(rank)}, {}, mesh=mesh)
    save(folder / "replicas", {name: Box.whole(whole(name)) for name in ROWS}, {}, mesh=mesh)
    for name in ("rows4", "replicas"):
        check_loads(folder / name, mesh)


def two_ranks(rank: int, world_size: int, folder: Path) -> None:
    mesh = init(CpuBackend(), ParallelConfig())
    for name in ("rows4", "replicas"):
        check_loads(folder / name, mesh)
    column = Box(torch.empty(11, 2, dtype=torch.float64), (0, rank * 2), (11, 4))
    load(folder / "quarters", {"many": column}, mesh=mesh)
    assert torch.equal(column.local, whole("many")[column.slices])
    run = folder / "run"
    for step in (10, 20):
        save(step_directory(run, step), sharded(rank, 2), {"step": step}, mesh=mesh)
    assert newest_complete(run, mesh=mesh) == step_directory(run, 20)
    check_disk_full_on_one_rank(run, mesh)
    check_failure_at_the_end(run, mesh)
    check_damage(run, mesh)


def check_disk_full_on_one_rank(run: Path, mesh: Mesh) -> None:
    """Every rank raises, whichever ran out of space; older checkpoints stay."""
    for full_rank in (0, 1):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if mesh.rank == full_rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))
        try:
            with pytest.raises(CheckpointError, match=f"rank {full_rank}: OSError.*too large"):
                save(step_directory(run, 30), sharded(mesh.rank, 2), {}, mesh=mesh)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        mesh.barrier()
        left = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert left == ["step_00000010", "step_00000020"]
        mesh.barrier()


def check_failure_at_the_end(run: Path, mesh: Mesh) -> None:
    """What goes wrong on the rank that completes the folder is everyone's error."""

    def add(folder: Path) -> None:
        raise OSError("no tokenizer")

    with pytest.raises(CheckpointError, match="failed on rank 0: OSError: no tokenizer"):
        save(step_directory(run, 30), sharded(mesh.rank, 2), {}, mesh=mesh, add_files=add)
    mesh.barrier()
    assert not step_directory(run, 30).exists()


def check_damage(run: Path, mesh: Mesh) -> None:
    """Ranks hash different files; all of them learn of the damage and choose alike."""
    damaged = step_directory(run, 20) / "__1_0.distcp"
    if mesh.is_main:
        damaged.write_bytes(damaged.read_bytes()[:-5])
    mesh.barrier()
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp has \d+ bytes instead"):
        load(step_directory(run, 20), sharded(mesh.rank, 2), mesh=mesh)
    assert newest_complete(run, mesh=mesh) == step_directory(run, 10)
    with pytest.raises(CheckpointError, match="must hold other"):
        load(step_directory(run, 10), {"other": Box.whole(torch.zeros(1))}, mesh=mesh)
    with pytest.raises(CheckpointError, match="got nothing there"):
        load(run / "nowhere", {}, mesh=mesh)


def test_any_layout_loads_what_any_other_wrote(tmp_path: Path) -> None:
    run_ranks(four_ranks, 4, tmp_path, tmp_path=tmp_path)
    run_ranks(two_ranks, 2, tmp_path, tmp_path=tmp_path)
    for name in ("rows4", "replicas"):
        verify(tmp_path / name)
        found = dict(read_tensors(tmp_path / name))
        assert all(torch.equal(found[key], whole(key)) for key in ROWS)
    assert torch.equal(dict(read_tensors(tmp_path / "quarters"))["many"], whole("many"))
    # Replicas are written once.
    sizes = {
        name: sum(
            fact["bytes"]
            for file, fact in read_manifest(tmp_path / name)["files"].items()
            if file.endswith(".distcp")
        )
        for name in ("rows4", "replicas")
    }
    assert sizes["replicas"] <= sizes["rows4"]


def test_an_incomplete_checkpoint_is_refused(tmp_path: Path) -> None:
    """Boxes that leave a hole (a lost rank's part) must not load as whatever was in memory."""
    save(tmp_path / "c", {"many": rows("many", 0, 2)}, {})
    target = Box.whole(torch.zeros(11, 4, dtype=torch.float64))
    with pytest.raises(CheckpointError, match=r"many must hold 44 values .* got 24"):
        load(tmp_path / "c", {"many": target})
