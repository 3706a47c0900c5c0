"""The rows of a run: `metrics.jsonl` (one object a step) and `eval.jsonl`, never a step twice.

A row is on its way to the disk before the checkpoint of its step is written, so a run that is
killed anywhere can be cut back to its checkpoint. Owns the files; what is in a row comes from the
loop, except for the arithmetic of throughput and model FLOPs utilisation.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from models.config import ModelConfig
from models.cost import flops_per_token, matrix_parameter_count
from training.callbacks import Callback, notify

logger = logging.getLogger(__name__)


class RowFile:
    """An append-only file of JSON objects, each with a `step`, flushed row by row."""

    def __init__(self, path: Path, *, last_step: int) -> None:
        """Open `path`, first dropping rows after `last_step` and half a last line.

        Raises:
            OSError: the folder cannot be written.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        dropped = truncate_after(path, last_step)
        if dropped:
            logger.info("%s: %d bytes after step %d dropped", path.name, dropped, last_step)
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row; numbers that JSON cannot hold become null.

        Raises:
            OSError: the disk is full.
        """
        self._file.write(json.dumps(_finite(row), allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Force all rows to the disk, as a checkpoint that relies on them needs."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; what could not be written before is not tried again."""
        with contextlib.suppress(OSError):
            self._file.close()


def truncate_after(path: Path, last_step: int) -> int:
    """Cut a row file before its first row above `last_step` or first broken line.

    Returns the number of bytes dropped. Rows are in order of step, so what stays is a prefix; the
    cut is one `truncate`, so it is whole or absent after a crash.
    """
    if not path.exists():
        return 0
    keep = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n") or not _is_row_up_to(line, last_step):
                break
            keep += len(line)
    size = path.stat().st_size
    if keep < size:
        os.truncate(path, keep)
    return size - keep


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All whole rows of a row file; a missing file has none."""
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        rows.append(json.loads(line))
    return rows


@dataclass(frozen=True, slots=True)
class Visible:
    """Keys visible to the queries of one step, summed over its tokens: to F and to S layers."""

    full: float
    window: float


@dataclass(frozen=True, slots=True)
class Throughput:
    """Turns one step's tokens, seconds and visible keys into rates.

    `mfu` follows `models.cost`: model FLOPs with the keys that were really visible in the packed
    documents and with what sinks take, recomputation and spike encoding not counted. `mfu_6n` is
    the usual 6 N a token, N without the embedding lookup.
    `peak_flops` is that of all ranks together, None where it is unknown.
    """

    model: ModelConfig
    peak_flops: float | None

    def row(
        self, tokens: int, seconds: float, visible: Visible, *, microbatch_tokens: int
    ) -> dict[str, float | None]:
        """`tokens_per_second`, `mfu` and `mfu_6n` of one step of all ranks."""
        rate = tokens / seconds
        needed = flops_per_token(
            self.model,
            mean_visible_full=visible.full / tokens,
            mean_visible_window=visible.window / tokens,
            microbatch_tokens=microbatch_tokens,
        )
        return {
            "tokens_per_second": rate,
            "mfu": self._share(rate * needed),
            "mfu_6n": self._share(rate * 6.0 * matrix_parameter_count(self.model)),
        }

    def _share(self, flops_per_second: float) -> float | None:
        return None if self.peak_flops is None else flops_per_second / self.peak_flops


@dataclass(slots=True)
class Sinks:
    """Where rows go: on rank 0 the two files and the listeners, elsewhere nowhere.

    A row that cannot be written must end all ranks together, so the error is kept in `problem`
    until they next agree on something, and `check` raises it there.
    """

    metrics: RowFile | None
    evaluations: RowFile | None
    callbacks: Sequence[Callback]
    problem: OSError | None = None

    def step(self, row: Mapping[str, Any]) -> None:
        """Write and announce a step's row."""
        self._write(self.metrics, row)
        notify(self.callbacks, "on_step", row)

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Write and announce an evaluation's row."""
        self._write(self.evaluations, row)
        notify(self.callbacks, "on_evaluation", row)

    def check(self) -> None:
        """Raise the problem of an earlier row.

        Raises:
            OSError: a row could not be written.
        """
        if self.problem is not None:
            raise self.problem

    def sync(self) -> None:
        """Put all rows on the disk, before a checkpoint relies on them.

        Raises:
            OSError: some row could not be written.
        """
        self.check()
        for file in (self.metrics, self.evaluations):
            if file is not None:
                file.sync()

    def close(self) -> None:
        """Close files and listeners."""
        for callback in self.callbacks:
            callback.close()
        for file in (self.metrics, self.evaluations):
            if file is not None:
                file.close()

    def _write(self, file: RowFile | None, row: Mapping[str, Any]) -> None:
        if file is None or self.problem is not None:
            return
        try:
            file.write(row)
        except OSError as error:
            self.problem = error


def _is_row_up_to(line: bytes, last_step: int) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] <= last_step


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
