"""Runs that save beside training: the same checkpoints, stalls, waits, errors, stops."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import parallel.checkpoint
import parallel.checkpoint_writer
from data.tokenizer import Tokenizer
from parallel.checkpoint import CheckpointError, newest_complete, read_tensors, verify
from parallel.checkpoint_writer import CheckpointWriter
from tests.support.distributed import run_ranks
from tests.training.tiny_run import assert_same_run, rows_of, tiny_run
from training.config import RunConfig
from training.metrics import read_rows
from training.run import run
from training.state import TrainState
from training.step import Stepper

STALL = "checkpoint/stall_seconds"
ROW_FILES = ("metrics.jsonl", "eval.jsonl")


class Disk:
    """Holds what is saved in the background until it is released.

    Remembers the end of each save, and the last rows that its run had at its beginning.
    """

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.ends: list[str] = []
        self.last_rows: list[tuple[int, ...]] = []

    def save(self, original: Callable[..., None]) -> Callable[..., None]:
        def held(directory: Path, *arguments: Any, **options: Any) -> None:
            if threading.current_thread() is not threading.main_thread():
                rows = [rows_of(directory.parents[1], name)[-1:] for name in ROW_FILES]
                self.last_rows.append(tuple(row[0]["step"] if row else 0 for row in rows))
                self.gate.wait()
                self.gate.clear()
            original(directory, *arguments, **options)
            self.ends.append(directory.name)

        return held


@contextmanager
def slow_disk() -> Iterator[tuple[Disk, pytest.MonkeyPatch]]:
    disk = Disk()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel.checkpoint, "save", disk.save(parallel.checkpoint.save))
        yield disk, patch


def releasing(disk: Disk, original: Callable[..., Any]) -> Callable[..., Any]:
    """The same method; what is held goes on before it."""

    def wrapper(*arguments: Any, **options: Any) -> Any:
        disk.gate.set()
        return original(*arguments, **options)

    return wrapper


def steps_saved(run_dir: Path) -> list[str]:
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    for name in names:
        verify(run_dir / "checkpoints" / name)
    return names


def save_while_the_next_step_runs(config: RunConfig) -> None:
    """Nothing is written before the values have changed."""
    with slow_disk() as (disk, patch):
        step = Stepper.step

        def step_then_release(stepper: Stepper, state: TrainState, *rest: Any) -> Any:
            result = step(stepper, state, *rest)
            if state.step % 2 == 0 and state.step > 0:  # the first step after a save
                disk.gate.set()
            return result

        patch.setattr(Stepper, "step", step_then_release)
        # Nothing follows the last step.
        patch.setattr(CheckpointWriter, "finish", finish_at_the_end(disk, CheckpointWriter.finish))
        run(config)
    assert disk.ends == [f"step_{step:08d}" for step in (2, 4, 6)]
    # A checkpoint relies on the rows up to its step, so they come first.
    assert disk.last_rows == [(2, 2), (4, 4), (6, 6)]


def finish_at_the_end(disk: Disk, original: Callable[..., Any]) -> Callable[..., Any]:
    def finish(writer: CheckpointWriter) -> Any:
        if disk.ends[-1:] == ["step_00000004"]:
            disk.gate.set()
        return original(writer)

    return finish


def save_slower_than_the_interval(config: RunConfig) -> list[str]:
    """Each save lasts until the next one waits for it; returns the warnings."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    parallel.checkpoint_writer.logger.addHandler(handler)
    with slow_disk() as (disk, patch):
        join = parallel.checkpoint_writer._Save.join
        patch.setattr(parallel.checkpoint_writer._Save, "join", releasing(disk, join))
        run(config)
    parallel.checkpoint_writer.logger.removeHandler(handler)
    return messages


def fail_beside_training(rank: int, config: RunConfig) -> tuple[str, int]:
    """The second save cannot add its tokenizer; returns the error and the last step that began."""
    begun = 0
    with pytest.MonkeyPatch.context() as patch:
        step, agree, copy_to = Stepper.step, Stepper.agree, Tokenizer.copy_to

        def count(stepper: Stepper, state: TrainState, *rest: Any) -> Any:
            nonlocal begun
            begun = state.step + 1
            return step(stepper, state, *rest)

        def agree_after_saving(stepper: Stepper, *rest: Any, **options: Any) -> Any:
            for thread in threading.enumerate():
                if thread.name.startswith("step_"):
                    thread.join()
            options["saving"] = False
            return agree(stepper, *rest, **options)

        def copy(tokenizer: Tokenizer, folder: Path) -> None:
            if "step_00000004" in str(folder):
                raise OSError(28, "No space left on device")
            copy_to(tokenizer, folder)

        patch.setattr(Stepper, "step", count)
        patch.setattr(Stepper, "agree", agree_after_saving)
        patch.setattr(Tokenizer, "copy_to", copy)
        with pytest.raises(CheckpointError) as info:
            run(config)
    return str(info.value), begun


def fail_while_saving(config: RunConfig) -> None:
    """Training fails at step 3 while step 2 is being written: it is complete afterwards."""
    with slow_disk() as (disk, patch):
        step = Stepper.step

        def fail(stepper: Stepper, state: TrainState, *rest: Any) -> Any:
            if state.step == 2:
                raise RuntimeError("a broken step")
            return step(stepper, state, *rest)

        patch.setattr(Stepper, "step", fail)
        close = CheckpointWriter.close
        patch.setattr(CheckpointWriter, "close", releasing(disk, close))
        with pytest.raises(RuntimeError, match="a broken step"):
            run(config)
    assert disk.ends == ["step_00000002"]


def stop_while_saving(rank: int, config: RunConfig) -> None:
    """One rank is asked to stop in step 3 while step 2 is being written: both are saved."""
    with slow_disk() as (disk, patch):
        step = Stepper.step

        def step_with_signal(stepper: Stepper, state: TrainState, *rest: Any) -> Any:
            if state.step == 2 and rank == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            return step(stepper, state, *rest)

        patch.setattr(Stepper, "step", step_with_signal)
        join = parallel.checkpoint_writer._Save.join
        patch.setattr(parallel.checkpoint_writer._Save, "join", releasing(disk, join))
        assert run(config) is False
    assert disk.ends == ["step_00000002", "step_00000003"]


def scenarios(rank: int, world_size: int, data: Path, folder: Path) -> dict[str, Any]:
    def config(name: str, **checkpoint: Any) -> RunConfig:
        evaluation = {"interval_steps": 2, "rows": 3}
        options = {"keep_last": 9, **checkpoint}
        return tiny_run(data, folder / name, checkpoint=options, evaluation=evaluation)

    run(config("held", asynchronous=False))
    save_while_the_next_step_runs(config("beside"))
    warnings = save_slower_than_the_interval(config("slow"))
    error = fail_beside_training(rank, config("failed"))
    fail_while_saving(config("broken"))
    stop_while_saving(rank, config("stopped"))
    run(config("milestones", keep_last=1, keep_every_steps=4, interval_steps=1))
    return {"warnings": warnings, "error": error}


@pytest.fixture(scope="module")
def found(
    data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of all scenarios' runs, and what each rank saw in them."""
    folder = tmp_path_factory.mktemp("background")
    return folder, run_ranks(scenarios, 2, data, folder, tmp_path=folder)


@pytest.mark.parametrize("name", ["beside", "slow"])
def test_a_run_that_saves_beside_training_leaves_the_same_checkpoints(
    found: tuple[Path, Any], name: str
) -> None:
    folder, _ = found
    assert_same_run(folder / name, folder / "held")
    names = ["step_00000002", "step_00000004", "step_00000006"]
    assert steps_saved(folder / name) == steps_saved(folder / "held") == names
    for step in names:
        expected = dict(read_tensors(folder / "held" / "checkpoints" / step))
        tensors = dict(read_tensors(folder / name / "checkpoints" / step))
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[key], expected[key]) for key in expected), step


def test_the_stall_is_in_the_row_of_its_step(found: tuple[Path, Any]) -> None:
    folder, _ = found
    for name, steps in (("beside", [2, 4, 6]), ("held", [])):
        rows = read_rows(folder / name / "metrics.jsonl")
        assert [row["step"] for row in rows if STALL in row] == steps
        assert all(0 <= row[STALL] < 60 for row in rows if STALL in row)


def test_a_save_that_is_slower_than_the_interval_is_waited_for_and_named(
    found: tuple[Path, Any],
) -> None:
    _, ranks = found
    assert len(ranks[0]["warnings"]) == 2, ranks
    for message in ranks[0]["warnings"]:
        assert "s for the checkpoint before this one" in message
    assert ranks[1]["warnings"] == []


def test_an_error_beside_training_ends_every_rank_at_the_next_step(
    found: tuple[Path, Any],
) -> None:
    folder, ranks = found
    (message, begun), other = ranks[0]["error"], ranks[1]["error"]
    assert other == (message, begun)
    assert begun == 4
    assert f"checkpoint ({folder / 'failed' / 'checkpoints' / 'step_00000004'})" in message
    assert "No space left on device" in message
    assert steps_saved(folder / "failed") == ["step_00000002"]
    assert len(rows_of(folder / "failed")) == 4


def test_an_error_of_training_lets_the_save_end(found: tuple[Path, Any]) -> None:
    folder, _ = found
    newest = newest_complete(folder / "broken")
    assert newest is not None
    assert newest.name == "step_00000002"


def test_a_stop_while_saving_keeps_both_steps(found: tuple[Path, Any]) -> None:
    folder, _ = found
    assert steps_saved(folder / "stopped") == ["step_00000002", "step_00000003"]
    status = json.loads((folder / "stopped" / "stopped.json").read_text())
    assert status == {"reason": "SIGUSR1", "step": 3, "stage": "short"}


def test_milestones_stay(found: tuple[Path, Any]) -> None:
    folder, _ = found
    assert steps_saved(folder / "milestones") == ["step_00000004", "step_00000006"]
