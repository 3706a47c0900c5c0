"""A run that kills itself with SIGKILL at the n-th event, on all ranks at once.

Events are what touches the run folder: every file opened for writing, renamed, removed, cut or
made, and every row, before and in the middle of its line. Nothing waits for a clock.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.config import RunConfig
from training.metrics import RowFile
from training.run import run

PATH_EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")


class EventCounter:
    """Counts events of one rank; at `fatal` it kills every rank, itself last."""

    def __init__(self, run_dir: Path, *, fatal: int | None, pids: Path, world_size: int) -> None:
        self.count = 0
        self._run_dir = str(run_dir)
        self._fatal = fatal
        self._pids = [pids / str(rank) for rank in range(world_size)]

    def happened(self) -> None:
        self.count += 1
        if self.count == self._fatal:
            others = [int(path.read_text()) for path in self._pids if path.exists()]
            for pid in others:
                if pid != os.getpid():
                    os.kill(pid, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            is_write = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if is_write and str(path).startswith(self._run_dir):
                self.happened()
        elif event in PATH_EVENTS and str(arguments[0]).startswith(self._run_dir):
            self.happened()

    def watch_rows(self) -> None:
        """Make each row two events: before it, and with half of it in the file."""
        write = RowFile.write

        def write_with_events(rows: RowFile, row: Mapping[str, Any]) -> None:
            self.happened()
            if self.count + 1 == self._fatal:
                with rows.path.open("a") as half:
                    half.write('{"step": ')
                self.count = self._fatal - 1
            self.happened()
            write(rows, row)

        RowFile.write = write_with_events  # type: ignore[method-assign]


def run_until(
    rank: int, world_size: int, config: RunConfig, fatal_rank: int, fatal: int | None, pids: Path
) -> int:
    """Run in this process; returns how many events this rank saw when it was not killed."""
    (pids / str(rank)).write_text(str(os.getpid()))
    counter = EventCounter(
        Path(config.run_dir),
        fatal=fatal if rank == fatal_rank else None,
        pids=pids,
        world_size=world_size,
    )
    sys.addaudithook(counter.audit)
    counter.watch_rows()
    run(config)
    return counter.count
