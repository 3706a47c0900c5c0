"""Runs on several ranks: the same numbers as one, stopping together, one clear error on all."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.checkpoint import newest_complete
from tests.support.closeness import assert_close
from tests.support.distributed import RankError, run_ranks
from tests.training.tiny_run import (
    assert_same_run,
    manifest_of,
    rows_of,
    saved_tensors,
    tiny_run,
)
from training.config import RunConfig
from training.metrics import RowFile
from training.run import run
from training.step import Stepper, Work


def run_on_rank(rank: int, world_size: int, config: RunConfig) -> None:
    run(config)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    run_ranks(run_on_rank, 2, tiny_run(data, folder / "run"), tmp_path=folder)
    return folder / "run"


def test_two_ranks_compute_what_one_does(data: Path, tmp_path: Path) -> None:
    """float64, spiking on, held-out rows that do not divide among the ranks."""
    changes: dict[str, Any] = {
        "training": {"precision": "fp64", "microbatch_rows": 2},
        "evaluation": {"interval_steps": 3, "rows": 3},
    }
    run_ranks(run_on_rank, 1, tiny_run(data, tmp_path / "one", **changes), tmp_path=tmp_path)
    run_ranks(run_on_rank, 2, tiny_run(data, tmp_path / "two", **changes), tmp_path=tmp_path)
    for name in ("metrics.jsonl", "eval.jsonl"):
        for found, expected in zip(
            rows_of(tmp_path / "two", name), rows_of(tmp_path / "one", name), strict=True
        ):
            # A rank samples every other token of its own rows, so statistics are of other tokens.
            keys = [key for key in expected if not key.startswith("spike/")]
            assert found.keys() == expected.keys()
            for key in keys:
                if isinstance(expected[key], float):
                    assert_close(found[key], expected[key], relative=1e-9, name=key)
                else:
                    assert found[key] == expected[key], key
    left, right = saved_tensors(tmp_path / "two"), saved_tensors(tmp_path / "one")
    for name, tensor in right.items():
        assert_close(left[name], tensor, relative=1e-9, name=name)


def stop_on_rank(rank: int, world_size: int, config: RunConfig, stop_rank: int) -> None:
    """SIGTERM reaches one rank only, in the middle of its third step."""
    step = Stepper.step

    def step_with_signal(stepper: Stepper, state: Any, stage: Any, work: Work) -> Any:
        if rank == stop_rank and state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(stepper, state, stage, work)

    Stepper.step = step_with_signal  # type: ignore[method-assign]
    run(config)


@pytest.mark.parametrize("stop_rank", [0, 1])
def test_a_signal_to_one_rank_stops_all_after_the_step_with_a_checkpoint(
    data: Path, whole: Path, tmp_path: Path, stop_rank: int
) -> None:
    config = tiny_run(data, tmp_path / "run", checkpoint={"interval_steps": 100})
    run_ranks(stop_on_rank, 2, config, stop_rank, tmp_path=tmp_path)
    stopped = json.loads((tmp_path / "run" / "stopped.json").read_text())
    assert stopped == {"reason": "SIGTERM", "step": 3, "stage": "short"}
    assert manifest_of(tmp_path / "run")["step"] == 3
    assert len(rows_of(tmp_path / "run")) == 3
    run_ranks(run_on_rank, 2, config, tmp_path=tmp_path)
    assert not (tmp_path / "run" / "stopped.json").exists()
    assert_same_run(tmp_path / "run", whole)


def limited_run(rank: int, world_size: int, config: RunConfig, limit: int) -> str:
    """A disk on which no file can grow beyond `limit` bytes; the message of the error."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        run(config)
    except (RuntimeError, OSError) as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    "limit", [20_000, *(pytest.param(n, marks=pytest.mark.slow) for n in (2_000, 60_000))]
)
def test_a_full_disk_is_one_clear_error_and_loses_nothing(
    data: Path, whole: Path, tmp_path: Path, limit: int
) -> None:
    before = tiny_run(data, tmp_path / "run", training={"max_steps": 2})
    run_ranks(run_on_rank, 2, before, tmp_path=tmp_path)
    expected = saved_tensors(tmp_path / "run")
    config = tiny_run(data, tmp_path / "run")
    messages = run_ranks(limited_run, 2, config, limit, tmp_path=tmp_path)
    assert any("File too large" in message for message in messages), messages
    assert messages[0] == messages[1]
    newest = newest_complete(tmp_path / "run")
    assert newest is not None
    assert newest.name == "step_00000002"
    for name, tensor in saved_tensors(tmp_path / "run").items():
        assert torch.equal(tensor, expected[name])
    run_ranks(run_on_rank, 2, config, tmp_path=tmp_path)
    assert_same_run(tmp_path / "run", whole)


def test_a_wrong_number_of_ranks_is_refused_by_every_rank(data: Path, tmp_path: Path) -> None:
    config = tiny_run(data, tmp_path / "run", parallel={"dp": 3})
    with pytest.raises(RankError, match=r"parallel\.dp \(3\) must equal the number of processes"):
        run_ranks(run_on_rank, 2, config, tmp_path=tmp_path)
    assert not (tmp_path / "run").exists()


def test_rows_that_do_not_divide_among_ranks_are_refused(data: Path, tmp_path: Path) -> None:
    config = tiny_run(data, tmp_path / "run", training={"microbatch_rows": 4})
    with pytest.raises(RankError, match=r"got dp 2 x 4\. Set it to 128, or training\.microbatch"):
        run_ranks(run_on_rank, 2, config, tmp_path=tmp_path)


def failing_row(rank: int, world_size: int, config: RunConfig) -> None:
    """Rank 0 cannot write its second row."""
    write = RowFile.write

    def fail(rows: RowFile, row: Mapping[str, Any]) -> None:
        if row["step"] == 2:
            raise OSError(28, "No space left on device")
        write(rows, row)

    RowFile.write = fail  # type: ignore[method-assign]
    run(config)


def test_a_row_that_cannot_be_written_ends_every_rank(data: Path, tmp_path: Path) -> None:
    config = tiny_run(data, tmp_path / "run")
    with pytest.raises(RankError, match="No space left on device") as info:
        run_ranks(failing_row, 2, config, tmp_path=tmp_path)
    assert str(info.value).count("No space left on device") >= 2
