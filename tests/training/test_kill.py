"""kill -9 at any event of a run, then the same command: bit-equal to a run that nobody killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.checkpoint import read_tensors, verify
from parallel.checkpoint_folders import is_step_name
from tests.support.distributed import RankError, run_ranks
from tests.training.killed_run import (
    KILLED,
    KINDS,
    Kill,
    run_quickly,
    run_uninterrupted,
    run_until,
)
from tests.training.tiny_run import assert_same_run, rows_of, tiny_run
from training.config import RunConfig

ROOT = Path(__file__).resolve().parents[2]


STEPS = 12
ENDLESS = 100_000
"""More steps than any machine makes before it acts on a line that it reads."""
KILLS = 2
"""A life that is killed ends within six steps of its start, so there is always one left to kill."""


@dataclass(frozen=True)
class Whole:
    """The run that nobody killed, and how many events of each kind a rank sees in four steps."""

    size: int
    run_dir: Path
    events: list[dict[str, int]]

    def draw(self, generator: random.Random, kind: str) -> Kill:
        """An event of this kind, on any rank that has it."""
        rank = generator.choice([rank for rank in range(self.size) if kind in self.events[rank]])
        return Kill(
            rank,
            kind,
            generator.randint(1, self.events[rank][kind]),
            takes_all=generator.random() < 0.3,
            is_disk_slow=generator.random() < 0.5,
        )


def config_of(data: Path, run_dir: Path, *, steps: int = STEPS, **checkpoint: Any) -> RunConfig:
    return tiny_run(
        data,
        run_dir,
        training={"max_steps": steps},
        evaluation={"interval_steps": 3, "rows": 3},
        checkpoint=checkpoint,
    )


def uninterrupted(size: int, data: Path, folder: Path) -> Whole:
    """All its checkpoints stay, to be compared with those of a run at the moment of its death."""
    configs = (
        config_of(data, folder / "run", keep_every_steps=1),
        config_of(data, folder / "counted", steps=2),
        config_of(data, folder / "counted", steps=6),
    )
    pids = folder / "pids"
    pids.mkdir()
    events = run_ranks(run_uninterrupted, size, *configs, pids, tmp_path=folder)
    return Whole(size, folder / "run", events)


@pytest.fixture(scope="module")
def whole_alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return uninterrupted(1, data, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return uninterrupted(2, data, tmp_path_factory.mktemp("whole"))


def check_killed(data: Path, folder: Path, whole: Whole, seed: int) -> None:
    """Kill a run at random events, life after life; then it goes on to its end in peace."""
    generator = random.Random(seed)
    config = config_of(data, folder / "run", asynchronous=seed % 5 != 4)
    pids = folder / "pids"
    for life in range(KILLS):
        kill = whole.draw(generator, KINDS[(seed * KILLS + life) % len(KINDS)])
        shutil.rmtree(pids, ignore_errors=True)
        pids.mkdir()
        with pytest.raises(RankError, match=f"rank {kill.rank} died with exit status -9"):
            run_ranks(run_until, whole.size, config, kill, pids, tmp_path=folder)
        assert (pids / KILLED).exists(), kill
        check_what_is_left(folder / "run", whole.run_dir, kill)
    run_ranks(run_in_peace, whole.size, config, tmp_path=folder)
    assert_same_run(folder / "run", whole.run_dir)


def check_what_is_left(run_dir: Path, expected: Path, kill: Kill) -> None:
    """Rows and checkpoints are those of the whole run up to there; rows are never behind."""
    for name in ("metrics.jsonl", "eval.jsonl"):
        rows = rows_of(run_dir, name)
        assert rows == rows_of(expected, name)[: len(rows)], kill
    folder = run_dir / "checkpoints"
    found = (
        [path for path in folder.iterdir() if is_step_name(path.name)] if folder.exists() else []
    )
    for path in found:
        verify(path)
        tensors = dict(read_tensors(path))
        for key, value in read_tensors(expected / "checkpoints" / path.name):
            assert torch.equal(tensors.pop(key), value), (kill, path.name, key)
        assert not tensors
        assert len(rows_of(run_dir)) >= int(path.name[-8:]), kill


def run_in_peace(rank: int, world_size: int, config: RunConfig) -> None:
    run_quickly(config)


@pytest.mark.parametrize(
    "seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (0, *range(2, 11)))]
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    data: Path, tmp_path: Path, whole: Whole, seed: int
) -> None:
    check_killed(data, tmp_path, whole, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 4])
def test_a_killed_run_of_one_process_goes_on_too(
    data: Path, tmp_path: Path, whole_alone: Whole, seed: int
) -> None:
    check_killed(data, tmp_path, whole_alone, seed)


@pytest.mark.slow
def test_an_elastic_restart_goes_on_from_the_newest_checkpoint(
    data: Path, tmp_path: Path, whole: Whole
) -> None:
    """torchrun starts all ranks again when one is killed, here while it writes its second file."""
    (tmp_path / "pids").mkdir()
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "--max-restarts", "1", "-m", "tests.training.killed_run", str(data), str(tmp_path / "run"),
        str(tmp_path / "pids"), "file", "2", str(STEPS),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pids" / KILLED).exists(), "torchrun may name its peer, which fails too"
    assert_same_run(tmp_path / "run", whole.run_dir)


def start_real(
    data: Path, run_dir: Path, *more: str, torchrun: tuple[str, ...] = ()
) -> subprocess.Popen[str]:
    """`python -m launch.train` with a step a line on standard error, or the same under torchrun."""
    command = [
        sys.executable, *torchrun, "-m", "launch.train", "experiment=smoke_fp32",
        f"data.path={data}", f"run_dir={run_dir}", "model.vocab_size=300", "model.hidden_size=32",
        "model.head_dim=4", "model.intermediate_size=32", "checkpoint.interval_steps=2",
        "stages.main.global_batch_tokens=1024", "logging=disabled", "logging.interval_steps=1",
        *more,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stderr=subprocess.PIPE)


def read_to(process: subprocess.Popen[str], text: str) -> None:
    """Read standard error up to the line that says `text`."""
    assert process.stderr is not None
    log = ""
    for line in process.stderr:
        log += line
        if text in line:
            return
    pytest.fail(f"the process ended before it said {text!r}:\n{log}")


@pytest.mark.slow
def test_the_real_command_survives_kill_9_and_says_that_it_was_stopped(
    data: Path, tmp_path: Path
) -> None:
    """`python -m launch.train`, killed when it reports its third step, then asked to stop."""

    def start(name: str, steps: int) -> subprocess.Popen[str]:
        return start_real(data, tmp_path / name, f"training.max_steps={steps}")

    victim = start("cut", ENDLESS)
    read_to(victim, f"step 3/{ENDLESS}")
    victim.kill()
    assert victim.wait() == -signal.SIGKILL
    assert len(rows_of(tmp_path / "cut")) >= 3
    stopped = start("cut", ENDLESS)
    read_to(stopped, f"/{ENDLESS} ")
    stopped.send_signal(signal.SIGTERM)
    _, log = stopped.communicate()
    assert stopped.returncode == 0, log
    status = json.loads((tmp_path / "cut" / "stopped.json").read_text())
    assert (status["reason"], status["step"]) == ("SIGTERM", len(rows_of(tmp_path / "cut")))
    last = status["step"] + 2
    whole, resumed = start("whole", last), start("cut", last)
    _, log = resumed.communicate()
    assert resumed.returncode == 0, log
    assert "resumed from" in log
    _, log = whole.communicate()
    assert whole.returncode == 0, log
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.slow
def test_ranks_whose_launcher_was_killed_stop_and_leave_the_folder_to_the_next_job(
    data: Path, tmp_path: Path
) -> None:
    """torchrun's workers survive it; two jobs in one folder would write every row twice."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    steps = f"training.max_steps={ENDLESS}"
    orphaned = start_real(data, tmp_path / "run", steps, torchrun=torchrun)
    read_to(orphaned, f"step 3/{ENDLESS}")
    orphaned.kill()
    assert orphaned.stderr is not None
    log = orphaned.stderr.read()  # to its end: every rank has left
    assert orphaned.wait() == -signal.SIGKILL
    status = json.loads((tmp_path / "run" / "stopped.json").read_text())
    assert status["reason"] == "the end of its launcher"
    assert f"stopped by the end of its launcher after step {status['step']}" in log
    last = status["step"] + 2
    resumed = start_real(data, tmp_path / "run", f"training.max_steps={last}", torchrun=torchrun)
    _, log = resumed.communicate()
    assert resumed.returncode == 0, log
    assert [row["step"] for row in rows_of(tmp_path / "run")] == list(range(1, last + 1))
