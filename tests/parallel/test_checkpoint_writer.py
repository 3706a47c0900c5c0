"""Saves beside training: what they hold, waiting for each other, errors that all ranks hear of."""

from __future__ import annotations

import itertools
import logging
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import parallel.checkpoint_writer
from parallel.backend.cpu import CpuBackend
from parallel.checkpoint import (
    Box,
    CheckpointError,
    newest_complete,
    read_manifest,
    read_tensors,
    save,
    step_directory,
    verify,
)
from parallel.checkpoint_writer import CheckpointWriter
from parallel.config import ParallelConfig
from parallel.mesh import Mesh, init
from tests.support.distributed import run_ranks

ROWS = 5


def half(rank: int, fill: float) -> dict[str, Box]:
    """This rank's rows of two tensors; the second rank has none of the short one."""
    start = 3 * rank
    long = torch.arange(ROWS * 4, dtype=torch.float64).view(ROWS, 4)[start : start + 3] + fill
    short = torch.full((1 - rank, 2), fill, dtype=torch.bfloat16)
    return {"long": Box(long, (start, 0), (ROWS, 4)), "short": Box(short, (rank, 0), (1, 2))}


def into(directory: Path, boxes: dict[str, Box]) -> Callable[[Mesh], None]:
    return lambda mesh: save(directory, boxes, {}, mesh=mesh)


def data_files(directory: Path) -> dict[str, object]:
    files: dict[str, object] = read_manifest(directory)["files"]
    return {name: fact for name, fact in files.items() if name.endswith(".distcp")}


@contextmanager
def released_by(method: str, gate: threading.Event) -> Iterator[list[str]]:
    """Open the gate when a `_Save` is asked to `method`; returns what happened in which order."""
    order: list[str] = []
    original = getattr(parallel.checkpoint_writer._Save, method)

    def wrapper(saving: object) -> object:
        order.append(method)
        gate.set()
        return original(saving)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel.checkpoint_writer._Save, method, wrapper)
        yield order


def check_that_training_goes_on_while_a_snapshot_is_written(mesh: Mesh, folder: Path) -> None:
    """Files are those of a synchronous save at the step of the snapshot, bit for bit."""
    writer = CheckpointWriter(mesh)
    boxes = half(mesh.rank, 1.0)
    save(folder / "held", boxes, {}, mesh=mesh)
    gate = threading.Event()

    def work(background: Mesh) -> None:
        gate.wait()
        save(folder / "beside", snapshot.boxes, {}, mesh=background)

    snapshot = writer.take(boxes)
    assert not writer.is_writing
    writer.start(folder / "beside", work)
    assert writer.is_writing
    for number in range(20):  # training: values change and ranks talk, also while it writes
        for box in boxes.values():
            box.local.add_(1.0)
        assert mesh.gather(number) == [number] * mesh.size
        gate.set()
    writer.finish()
    assert not writer.is_writing
    verify(folder / "beside", mesh=mesh)
    assert data_files(folder / "beside") == data_files(folder / "held")
    assert len(data_files(folder / "held")) == mesh.size
    # The next snapshot has the same memory and the new values.
    places = {name: box.local.data_ptr() for name, box in snapshot.boxes.items()}
    again = writer.take(boxes).boxes
    assert {name: box.local.data_ptr() for name, box in again.items()} == places
    assert all(torch.equal(again[name].local, boxes[name].local) for name in boxes)
    # What has changed its shape is copied nonetheless.
    other = {"long": Box.whole(torch.ones(1, 4, dtype=torch.float64))}
    assert writer.take(other).boxes["long"].local.shape == (1, 4)


def check_back_pressure(mesh: Mesh, folder: Path) -> None:
    """A snapshot waits for a slow save of any rank, and says so with the seconds."""
    clock = itertools.count()
    writer = CheckpointWriter(mesh, clock=lambda: float(next(clock)))
    boxes = half(mesh.rank, 1.0)
    first = writer.take(boxes)
    assert first.stall_seconds == 1.0  # nothing to wait for: two readings
    gate = threading.Event()
    done: list[str] = []

    def slow(background: Mesh) -> None:
        save(folder / "slow", first.boxes, {}, mesh=background)
        if mesh.rank == 1:
            gate.wait()
        done.append("saved")

    writer.start(folder / "slow", slow)
    if mesh.is_main:  # the rank that speaks has nothing to wait for itself
        assert writer._save is not None
        writer._save.join()
    assert writer.is_writing is not mesh.is_main
    for box in boxes.values():
        box.local.add_(1.0)
    with released_by("join", gate) as order, caught_warnings() as messages:
        second = writer.take(boxes)
    assert (order, done) == (["join"], ["saved"])
    assert second.stall_seconds == 3.0  # four readings
    waited = [text for text in messages if "training waited 1.0 s" in text]
    assert len(waited) == (1 if mesh.is_main else 0), messages
    assert all("checkpoint.interval_steps. Save less often" in text for text in waited)
    writer.start(folder / "next", into(folder / "next", second.boxes))
    writer.finish()
    for name, fill in (("slow", 1.0), ("next", 2.0)):
        found = dict(read_tensors(folder / name))
        assert float(found["long"][0, 0]) == fill


def check_errors(mesh: Mesh, folder: Path) -> None:
    """Every rank raises the same at its next agreement, whichever failed and however."""
    writer = CheckpointWriter(mesh)
    run = folder / "run"
    boxes = half(mesh.rank, 1.0)
    save(step_directory(run, 10), boxes, {}, mesh=mesh)
    failing = step_directory(run, 20)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for full_rank in (0, 1):
        if mesh.rank == full_rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))
        writer.start(failing, into(failing, writer.take(boxes).boxes))
        with pytest.raises(CheckpointError, match=rf"rank {full_rank}: OSError.*too large") as info:
            writer.finish()
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert str(failing) in str(info.value)
        assert len(set(mesh.gather(str(info.value)))) == 1
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000010"]
        mesh.barrier()

    def fail_alone(background: Mesh) -> None:
        if mesh.rank == 1:
            raise ValueError("mine alone")

    writer.start(failing, fail_alone)
    message = r"step_00000020\) could not be completed in the background: ValueError: mine alone"
    with pytest.raises(CheckpointError, match=message):
        writer.take(boxes)
    # It is over: the next save has nothing to do with it.
    assert writer.finish() is None
    writer.start(failing, into(failing, writer.take(boxes).boxes))
    writer.finish()
    assert newest_complete(run, mesh=mesh) == failing


def check_closing(mesh: Mesh, folder: Path) -> None:
    """After an error of its own a rank waits for its save, without asking the others."""
    writer = CheckpointWriter(mesh)
    snapshot = writer.take(half(mesh.rank, 1.0))
    gate = threading.Event()

    def work(background: Mesh) -> None:
        gate.wait()
        save(folder / "closing", snapshot.boxes, {}, mesh=background)

    writer.start(folder / "closing", work)
    with released_by("join", gate):
        writer.close()
    verify(folder / "closing")
    mesh.barrier()

    def fail(background: Mesh) -> None:
        raise OSError("no such disk")

    writer.start(folder / "failed", fail)
    with caught_warnings() as messages:
        writer.close()
    assert len(messages) == 1
    assert "failed) could not be completed in the background: OSError: no such disk" in messages[0]
    assert writer.finish() is None


@contextmanager
def caught_warnings() -> Iterator[list[str]]:
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    target = parallel.checkpoint_writer.logger
    target.addHandler(handler)
    try:
        yield messages
    finally:
        target.removeHandler(handler)


def two_ranks(rank: int, world_size: int, folder: Path) -> None:
    mesh = init(CpuBackend(), ParallelConfig())
    assert mesh.on_own_group().group is not mesh.group
    assert dist.get_backend(mesh.on_own_group().group) == "gloo"
    check_that_training_goes_on_while_a_snapshot_is_written(mesh, folder / "snapshot")
    check_back_pressure(mesh, folder / "pressure")
    check_errors(mesh, folder / "errors")
    check_closing(mesh, folder / "closing")


def one_rank(rank: int, world_size: int, folder: Path) -> None:
    mesh = init(CpuBackend(), ParallelConfig())
    writer = CheckpointWriter(mesh)
    whole = {"w": Box.whole(torch.ones(3))}
    writer.start(folder / "alone", into(folder / "alone", writer.take(whole).boxes))
    writer.finish()
    assert torch.equal(dict(read_tensors(folder / "alone"))["w"], torch.ones(3))


def test_saves_beside_training_on_two_ranks(tmp_path: Path) -> None:
    run_ranks(two_ranks, 2, tmp_path, tmp_path=tmp_path)


def test_a_save_beside_training_alone(tmp_path: Path) -> None:
    run_ranks(one_rank, 1, tmp_path, tmp_path=tmp_path)
