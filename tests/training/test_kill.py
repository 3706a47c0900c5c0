"""kill -9 at any event of a run, then the same command: bit-equal to a run that nobody killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.distributed import RankError, run_ranks
from tests.training.killed_run import run_until
from tests.training.tiny_run import assert_same_run, rows_of, tiny_run
from training.config import RunConfig

ROOT = Path(__file__).resolve().parents[2]


def config_of(data: Path, run_dir: Path) -> RunConfig:
    return tiny_run(data, run_dir, evaluation={"interval_steps": 3, "rows": 3})


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def whole(
    request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, list[int], Path]:
    """World size, events a rank saw, folder of the run that nobody killed."""
    size: int = request.param
    folder = tmp_path_factory.mktemp("whole")
    config = config_of(data, folder / "run")
    events = run_ranks(run_until, size, config, 0, None, folder, tmp_path=folder)
    return size, events, folder / "run"


@pytest.mark.parametrize("seed", range(4))
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    data: Path, tmp_path: Path, whole: tuple[int, list[int], Path], seed: int
) -> None:
    """Killed anywhere, and again soon after the second start."""
    size, events, expected = whole
    generator = random.Random(seed)
    fatal_rank = generator.choice([rank for rank in range(size) if events[rank] > 0])
    config = config_of(data, tmp_path / "run")
    for rank, fatal in (
        (fatal_rank, generator.randint(1, events[fatal_rank])),
        (0, generator.randint(1, 3)),
    ):
        with pytest.raises(RankError, match="exit status -9"):
            run_ranks(run_until, size, config, rank, fatal, tmp_path, tmp_path=tmp_path)
    run_ranks(run_until, size, config, 0, None, tmp_path, tmp_path=tmp_path)
    assert_same_run(tmp_path / "run", expected)


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


@pytest.mark.slow
def test_the_real_command_survives_kill_9_and_says_that_it_was_stopped(
    data: Path, tmp_path: Path
) -> None:
    """`python -m launch.train`, killed when it reports its third step, then asked to stop."""

    def start(run_dir: Path) -> subprocess.Popen[str]:
        return start_real(data, run_dir, "training.max_steps=5")

    whole = start(tmp_path / "whole")
    victim = start(tmp_path / "cut")
    assert victim.stderr is not None
    for line in victim.stderr:
        if "step 3/5" in line:
            victim.kill()
            break
    assert victim.wait() == -signal.SIGKILL
    assert len(rows_of(tmp_path / "cut")) >= 3
    stopped = start(tmp_path / "cut")
    assert stopped.stderr is not None
    for line in stopped.stderr:
        if "step 3/5" in line:
            stopped.send_signal(signal.SIGTERM)
            break
    _, log = stopped.communicate()
    assert stopped.returncode == 75, log
    assert (tmp_path / "cut" / "stopped.json").exists()
    resumed = start(tmp_path / "cut")
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
    orphaned = start_real(data, tmp_path / "run", "training.max_steps=100000", torchrun=torchrun)
    assert orphaned.stderr is not None
    for line in orphaned.stderr:
        if "step 3/100000" in line:
            orphaned.kill()
            break
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
