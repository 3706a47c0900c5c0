"""launch/torchrun.sh: what it hands to torchrun, what it refuses, and how jobs end through it.

"Machines" are scripts of one job on loopback. They write to one pipe, so a test reads the job's
lines in the order of events and acts on one of them.
"""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from launch.compose import load_config
from tests.launch.trained import prepared
from tests.support.closeness import assert_close
from tests.support.distributed import run_ranks
from tests.training.tiny_run import assert_same_run, manifest_of, rows_of
from training.config import RunConfig
from training.run import run

__all__ = ["prepared"]

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "torchrun.sh"
STEPS = 12
ENDLESS = "training.max_steps=100000"
VARIABLES = ("LOG_DIR", "NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")


def environment_with(**changes: str) -> dict[str, str]:
    """This process's environment without what a surrounding launcher may have set."""
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return {**kept, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **changes}


def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The script from start to end."""
    return subprocess.run(
        [str(SCRIPT), *arguments], env=environment_with(**environment), cwd=ROOT,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


# The command line, with an interpreter that notes what it is asked to run.


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    """An interpreter that prints settings, notes torchrun's arguments and leaves with 7."""
    path = tmp_path / "python"
    path.write_text(
        "#!/usr/bin/env bash\n"
        "if [[ $2 == launch.environment ]]; then\n"
        "  echo 'export LOG_DIR=runs/logs NPROC_PER_NODE=3'\n"
        "else\n"
        f"  printf '%s\\0' \"$@\" > {shlex.quote(str(tmp_path / 'arguments'))}\n"
        "  exit 7\n"
        "fi\n"
    )
    path.chmod(0o755)
    return path


def noted(stub: Path) -> list[str]:
    return stub.with_name("arguments").read_text().split("\0")[:-1]


def test_overrides_reach_the_workers_untouched_and_the_status_comes_back(stub: Path) -> None:
    overrides = ["model.mixers=[L S]*2", "prompt='a  \"b\" $HOME'", "parallel.tp=2", "x=*", "y="]
    done = call(*overrides, PYTHON=str(stub))
    assert (done.returncode, done.stderr) == (7, "logs of all ranks: runs/logs\n")
    found = noted(stub)
    assert found[-5:] == overrides
    assert found[:-5] == shlex.split(
        "-m torch.distributed.run --nnodes 1 --nproc-per-node 3 --standalone --max-restarts 0 "
        "--log-dir runs/logs --redirects 3 --tee 0:3 -m launch.train"
    )


@pytest.mark.parametrize(("rank", "is_host"), [("0", "true"), ("2", "false")])
def test_machines_meet_at_the_first_one(stub: Path, rank: str, is_host: str) -> None:
    done = call(
        PYTHON=str(stub), NNODES="3", NODE_RANK=rank, MASTER_ADDR="node-a", MASTER_PORT="29400",
        LOCAL_ADDR="10.0.0.7", JOB_ID="night", JOIN_SECONDS="90", MAX_RESTARTS="4",
    )  # fmt: skip
    assert done.returncode == 7
    line = shlex.join(noted(stub))
    assert "--nnodes 3 " in line
    assert "--rdzv-backend c10d --rdzv-endpoint node-a:29400 --rdzv-id night " in line
    assert f"--rdzv-conf is_host={is_host},join_timeout=90,read_timeout=90 " in line
    assert "--local-addr 10.0.0.7 --max-restarts 4 " in line
    assert "--standalone" not in line


@pytest.mark.parametrize(
    ("environment", "arguments", "message"),
    [
        ({"NNODES": "two"}, [], "NNODES (two) must be a number of machines, 1 or more."),
        ({"NNODES": "0"}, [], "NNODES (0) must be a number of machines, 1 or more."),
        ({"NNODES": "2"}, [], "NODE_RANK () must be from 0 to NNODES - 1: got NNODES 2."),
        ({"NNODES": "2", "NODE_RANK": "2"}, [], "NODE_RANK (2) must be from 0 to NNODES - 1"),
        ({"NNODES": "2", "NODE_RANK": "1"}, [], "MASTER_ADDR () must name the machine with"),
        ({}, ["seed=1", "--cfg"], "argument (--cfg) must be key=value. Give flags to python -m"),
    ],
)
def test_refuses(
    stub: Path, environment: dict[str, str], arguments: list[str], message: str
) -> None:
    done = call(*arguments, PYTHON=str(stub), **environment)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")
    assert not stub.with_name("arguments").exists()


def test_help_names_every_variable_that_the_script_reads() -> None:
    done = call("--help")
    assert done.returncode == 0
    read = set(re.findall(r"\$\{?([A-Z][A-Z_]+)", SCRIPT.read_text()))
    told = set(re.findall(r"^  ([A-Z][A-Z_]+)  ", done.stdout, flags=re.MULTILINE))
    assert read == told
    assert len(told) == 11


def test_a_wrong_key_is_refused_before_anything_starts() -> None:
    done = call("training.max_step=3")
    assert done.returncode == 2
    assert "training.max_step is not a known key" in done.stderr
    assert "torch.distributed" not in done.stderr


# Whole jobs.


def overrides(data: Path, run_dir: Path) -> list[str]:
    """Steps of a fraction of a second: `smoke`, narrower, with few tokens."""
    return [
        "experiment=smoke", f"data.path={data}", f"run_dir={run_dir}", "model.vocab_size=300",
        "model.hidden_size=32", "model.head_dim=4", "model.intermediate_size=32",
        "stages.main.global_batch_tokens=1024", "checkpoint.interval_steps=3",
        "logging.wandb=disabled", "logging.interval_steps=1",
    ]  # fmt: skip


def hear_signals() -> None:
    """Undo what tests in the background inherit: a shell cannot trap what it was born ignoring."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Job:
    """The running scripts of one job."""

    def __init__(self, arguments: list[str], machines: list[dict[str, str]]) -> None:
        lines, sink = os.pipe()
        self.scripts = [
            subprocess.Popen(
                [str(SCRIPT), *arguments], env=environment_with(**machine), cwd=ROOT,
                stdout=sink, stderr=sink, preexec_fn=hear_signals,
            )
            for machine in machines
        ]  # fmt: skip
        os.close(sink)
        self.lines = os.fdopen(lines)
        self.log = ""

    def until(self, text: str) -> None:
        """Read up to the line that says `text`."""
        for line in self.lines:
            self.log += line
            if text in line:
                return
        pytest.fail(f"the job ended before it said {text!r}:\n{self.log}")

    def end(self) -> list[int]:
        """Statuses of the scripts, after the last process of the job has gone."""
        self.log += self.lines.read()
        return [script.wait() for script in self.scripts]

    def processes(self, machine: int) -> list[psutil.Process]:
        """The script, torchrun and its ranks."""
        script = psutil.Process(self.scripts[machine].pid)
        return [script, *script.children(recursive=True)]

    def rank(self, rank: int) -> psutil.Process:
        """The process of one rank."""
        everyone = [each for index in range(len(self.scripts)) for each in self.processes(index)]
        (found,) = [each for each in everyone if rank_of(each) == str(rank)]
        return found


def rank_of(process: psutil.Process) -> str | None:
    """None for what is no rank, or has gone since it was listed."""
    with suppress(psutil.Error):
        return process.environ().get("RANK")
    return None


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def machine(rank: int, machines: int, port: str) -> dict[str, str]:
    """Variables of one of several machines on loopback."""
    return {
        "NNODES": str(machines), "NODE_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
        "LOCAL_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip


@contextmanager
def started(
    data: Path, run_dir: Path, *more: str, machines: int = 1, **environment: str
) -> Iterator[Job]:
    """A job that does not outlive its test."""
    each = [environment] * machines
    if machines > 1:
        port = free_port()
        each = [machine(rank, machines, port) | environment for rank in range(machines)]
    job = Job([*overrides(data, run_dir), *more], each)
    try:
        yield job
    finally:
        for index, script in enumerate(job.scripts):
            if script.poll() is None:
                for process in job.processes(index):
                    process.kill()
                script.wait()
        job.lines.close()


@pytest.fixture(scope="module")
def two_machines(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of two machines with one process each that nobody disturbed."""
    run_dir = tmp_path_factory.mktemp("two") / "run"
    with started(prepared, run_dir, f"training.max_steps={STEPS}", machines=2) as job:
        assert job.end() == [0, 0], job.log
    return run_dir


def run_on_rank(rank: int, world_size: int, config: RunConfig) -> None:
    run(config)


@pytest.mark.slow
def test_two_machines_compute_what_one_process_does(
    prepared: Path, tmp_path: Path, two_machines: Path
) -> None:
    arguments = [*overrides(prepared, tmp_path / "one"), f"training.max_steps={STEPS}"]
    run_ranks(run_on_rank, 1, load_config("train", RunConfig, arguments), tmp_path=tmp_path)
    expected, found = rows_of(tmp_path / "one"), rows_of(two_machines)
    assert len(found) == len(expected) == STEPS
    for left, right in zip(found, expected, strict=True):
        assert_close(left["loss"], right["loss"], relative=1e-10, name="loss")
        assert_close(left["grad_norm"], right["grad_norm"], relative=1e-9, name="grad_norm")
        for key in ("step", "tokens", "sample_hash", "lr"):
            assert left[key] == right[key]
    logs = sorted((two_machines / "logs").glob("synfire_*/attempt_0/0/stderr.log"))
    assert len(logs) == 2
    assert sum("step 1/12" in log.read_text() for log in logs) == 1


@pytest.mark.slow
def test_a_killed_rank_restarts_all_from_the_newest_checkpoint(
    prepared: Path, tmp_path: Path, two_machines: Path
) -> None:
    """kill -9 on a random rank, once a checkpoint is there: bit-equal to an undisturbed run."""
    victim = random.Random(1).randrange(2)
    last = f"training.max_steps={STEPS}"
    with started(prepared, tmp_path / "run", last, machines=2, MAX_RESTARTS="1") as job:
        job.until("step_00000003 in ")
        job.rank(victim).kill()
        assert job.end() == [0, 0], job.log
    assert re.search(r"resumed from .*/step_000000(0[369]|[12]\d)", job.log), job.log
    assert len(list((tmp_path / "run" / "logs").glob("*/attempt_1/0/stderr.log"))) == 2
    assert_same_run(tmp_path / "run", two_machines)


def assert_stopped_and_saved(run_dir: Path, job: Job) -> None:
    stopped = json.loads((run_dir / "stopped.json").read_text())
    assert stopped["reason"] == "SIGUSR1"
    assert manifest_of(run_dir)["step"] == stopped["step"] == len(rows_of(run_dir))
    assert "resumed" not in job.log


@pytest.mark.slow
def test_a_request_to_one_machine_stops_all_with_a_checkpoint(
    prepared: Path, tmp_path: Path
) -> None:
    """SIGUSR1 to every process of one machine, as schedulers send it; torchrun must survive it."""
    with started(prepared, tmp_path / "run", ENDLESS, machines=2, MAX_RESTARTS="1") as job:
        job.until("step 4/")
        for process in job.processes(1):
            process.send_signal(signal.SIGUSR1)
        assert job.end() == [0, 0], job.log
    assert_stopped_and_saved(tmp_path / "run", job)


@pytest.mark.slow
def test_a_request_to_the_script_reaches_its_ranks(prepared: Path, tmp_path: Path) -> None:
    with started(prepared, tmp_path / "run", ENDLESS) as job:
        job.until("step 4/")
        job.scripts[0].send_signal(signal.SIGTERM)
        assert job.end() == [0], job.log
    assert_stopped_and_saved(tmp_path / "run", job)


@pytest.mark.slow
def test_ranks_that_start_up_are_asked_until_they_listen(prepared: Path, tmp_path: Path) -> None:
    with started(prepared, tmp_path / "run", ENDLESS) as job:
        job.until("collectives: gloo")
        job.scripts[0].send_signal(signal.SIGINT)
        assert job.end() == [0], job.log
    assert json.loads((tmp_path / "run" / "stopped.json").read_text())["reason"] == "SIGUSR1"


@pytest.mark.slow
def test_a_request_before_there_is_a_rank_ends_the_wait_for_other_machines(
    prepared: Path, tmp_path: Path
) -> None:
    with started(prepared, tmp_path / "run", **machine(0, 2, free_port())) as job:
        job.until("logs of all ranks")
        job.scripts[0].send_signal(signal.SIGHUP)
        assert job.end() == [128 + signal.SIGTERM], job.log


@pytest.mark.slow
def test_a_crash_is_a_failure_with_its_reason_in_the_ranks_file(
    prepared: Path, tmp_path: Path
) -> None:
    logs = tmp_path / "elsewhere"
    with started(tmp_path / "nothing", tmp_path / "run", LOG_DIR=str(logs)) as job:
        assert job.end() == [1], job.log
    (log,) = logs.glob("*/attempt_0/0/stderr.log")
    assert "error: data.path" in log.read_text()
    assert "rank 0: error: data.path" in job.log


@pytest.mark.slow
def test_quit_ends_the_ranks_at_once(prepared: Path, tmp_path: Path) -> None:
    with started(prepared, tmp_path / "run", ENDLESS) as job:
        job.until("collectives: gloo")
        rank = job.rank(0)
        job.scripts[0].send_signal(signal.SIGQUIT)
        assert job.end() == [1], job.log
        assert not rank.is_running()
