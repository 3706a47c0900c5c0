"""A run that is killed with SIGKILL at the n-th event of a kind, on one rank or on all at once.

Events are rows (before one, and in the middle of its line), steps, snapshots (before and after),
and what touches the run folder: files opened for writing, and names that are made, changed or
removed, in its checkpoints or beside them, by whichever thread. Nothing waits for a clock: on the
slow disk a save lasts until training waits for it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import parallel.checkpoint_files
from parallel.backend.cpu import CpuBackend
from parallel.checkpoint_writer import _Save
from parallel.process_group import end_process
from training.checkpoint import Checkpoints
from training.config import RunConfig
from training.metrics import RowFile
from training.run import run
from training.step import Stepper

NAME_EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
KILLED = "killed"
"""What a dying rank leaves beside the files that are named by pids, whoever reports its end."""
KINDS = ("row", "step", "snapshot", "file", "name", "folder")
"""`file` and `name` are the checkpoints'; `folder` is both of everything else in the run folder."""


@dataclass(frozen=True)
class Kill:
    """Die on `rank` at its `number`-th event of `kind`; `takes_all` kills every rank with it."""

    rank: int
    kind: str
    number: int
    takes_all: bool = False
    is_disk_slow: bool = False


class Events:
    """Counts the events of one rank, in all its threads, and kills at the fatal one."""

    def __init__(self, run_dir: Path, rank: int, kill: Kill | None, pids: Path) -> None:
        self.counts: Counter[str] = Counter()
        self._run_dir = str(run_dir)
        self._checkpoints = str(run_dir / "checkpoints" / "")
        self._kill = kill if kill is not None and kill.rank == rank else None
        self._pids = pids
        (pids / str(os.getpid())).touch()

    def happened(self, kind: str) -> None:
        self.counts[kind] += 1
        if self.is_fatal(kind, self.counts[kind]):
            self._die()

    def is_fatal(self, kind: str, number: int) -> bool:
        kill = self._kill
        return kill is not None and (kill.kind, kill.number) == (kind, number)

    def watch(self) -> None:
        sys.addaudithook(self._audit)
        patch(Stepper, "agree", before=lambda: self.happened("step"))
        snapshot = {"before": lambda: self.happened("snapshot")}
        patch(Checkpoints, "take", **snapshot, after=snapshot["before"])
        self._watch_rows()

    def _die(self) -> None:
        assert self._kill is not None
        pids = [int(path.name) for path in self._pids.iterdir()]
        (self._pids / KILLED).touch()
        for pid in pids if self._kill.takes_all else ():
            if pid != os.getpid():
                os.kill(pid, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            flags = arguments[2]
            is_change = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            is_change = event in NAME_EVENTS
        if is_change and str(arguments[0]).startswith(self._checkpoints):
            self.happened("file" if event == "open" else "name")
        elif is_change and str(arguments[0]).startswith(self._run_dir):
            self.happened("folder")

    def _watch_rows(self) -> None:
        """Make each row two events: before it, and with half of it in the file."""
        write = RowFile.write

        def write_with_events(rows: RowFile, row: Mapping[str, Any]) -> None:
            self.happened("row")
            if self.is_fatal("row", self.counts["row"] + 1):
                rows._file.write('{"step": ')
                rows._file.flush()
            self.happened("row")
            write(rows, row)

        RowFile.write = write_with_events  # type: ignore[method-assign]


def patch(
    owner: type, name: str, *, before: Callable[[], Any], after: Callable[[], Any] | None = None
) -> None:
    """Let a method of this process do something first, and last."""
    original = getattr(owner, name)

    def wrapper(*arguments: Any, **options: Any) -> Any:
        before()
        result = original(*arguments, **options)
        if after is not None:
            after()
        return result

    setattr(owner, name, wrapper)


def slow_disk() -> None:
    """Let no file of a save in the background begin before training waits for the save."""
    waited_for = threading.Event()

    def wait() -> None:
        if threading.current_thread() is not threading.main_thread():
            waited_for.wait()

    patch(_Save, "__init__", before=waited_for.clear)
    patch(_Save, "join", before=waited_for.set)
    patch(parallel.checkpoint_files.HashedFile, "__init__", before=wait)


def run_until(rank: int, world_size: int, config: RunConfig, kill: Kill, pids: Path) -> None:
    """Run in this process until it is killed."""
    Events(Path(config.run_dir), rank, kill, pids).watch()
    if kill.is_disk_slow:
        slow_disk()
    run_quickly(config)


def run_uninterrupted(
    rank: int, world_size: int, whole: RunConfig, begun: RunConfig, gone_on: RunConfig, pids: Path
) -> dict[str, int]:
    """Run `whole`; then run `begun` and go on: returns the events of each kind when it went on."""
    run_quickly(whole)
    run_quickly(begun)
    events = Events(Path(gone_on.run_dir), rank, None, pids)
    events.watch()
    run_quickly(gone_on)
    return dict(events.counts)


def run_quickly(config: RunConfig) -> None:
    """Leave out the measurement of this machine, which is for the log alone."""
    CpuBackend.peak_flops = lambda backend, dtype: None  # type: ignore[method-assign]
    run(config)


def main(prepared: str, run_dir: str, pids: str, kind: str, number: str, steps: str) -> None:
    """A worker of torchrun whose last rank is killed once, on the slow disk."""
    from tests.training.tiny_run import tiny_run

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    kill: Kill | None = Kill(world_size - 1, kind, int(number), is_disk_slow=True)
    if os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
        kill = None
    config = tiny_run(
        Path(prepared),
        Path(run_dir),
        training={"max_steps": int(steps)},
        evaluation={"interval_steps": 3, "rows": 3},
    )
    try:
        if kill is not None:
            run_until(rank, world_size, config, kill, Path(pids))
        run_quickly(config)
    except RuntimeError:
        end_process(1)
    end_process(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
