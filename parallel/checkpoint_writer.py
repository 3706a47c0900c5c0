"""Checkpoints beside training: values copied to host memory, then written by a thread.

Owns the copies, the thread and what ranks tell each other about it: whatever is decided here is
decided by all ranks at the same step. The thread talks over a process group of its own, because
the training ranks' collectives must keep their order. What is written where is the caller's.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from parallel.boxes import Box
from parallel.checkpoint_folders import CheckpointError
from parallel.mesh import Mesh

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """This rank's boxes, copied, and how long training was held to wait and to copy."""

    boxes: dict[str, Box]
    stall_seconds: float


class CheckpointWriter:
    """At most one save in the background; its copies live in buffers that all saves share.

    Collective, as is every method that does not say otherwise: ranks call them at the same step.
    """

    def __init__(self, mesh: Mesh, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._mesh = mesh
        self._background_mesh = mesh.on_own_group()
        self._clock = clock
        self._buffers: dict[str, Tensor] = {}
        self._save: _Save | None = None

    @property
    def is_writing(self) -> bool:
        """Whether this rank's thread is at work; not collective, so agree before acting on it."""
        return self._save is not None and self._save.is_alive()

    def take(self, tensors: Mapping[str, Box]) -> Snapshot:
        """Copy boxes to host memory, once the save before is done: its buffers are used again.

        Raises:
            CheckpointError: the save before failed, on every rank alike.
        """
        started = self._clock()
        waited_seconds = self.finish()
        if waited_seconds is not None and self._mesh.is_main:
            logger.warning(
                "training waited %.1f s for the checkpoint before this one: writing takes longer "
                "than checkpoint.interval_steps. Save less often, or to a faster disk.",
                waited_seconds,
            )  # fmt: skip
        boxes = {name: box.like(self._copy(name, box.local)) for name, box in tensors.items()}
        return Snapshot(boxes, self._clock() - started)

    def start(self, directory: Path, work: Callable[[Mesh], None]) -> None:
        """Let `work` write `directory` in the background.

        `work` is given this mesh over the background's own group, and may use no other.
        """
        assert self._save is None, "one save at a time: finish comes first"
        self._save = _Save(directory, lambda: work(self._background_mesh))

    def finish(self) -> float | None:
        """Wait until every rank's save is done, if there is one.

        Returns the seconds that this rank waited, None when no rank was still writing.

        Raises:
            CheckpointError: it failed on some rank; every rank raises the same.
        """
        save = self._save
        if save is None:
            return None
        started, was_writing = self._clock(), save.is_alive()
        save.join()
        self._save = None
        answers = self._mesh.gather((was_writing, save.problem))
        problems = [problem for _, problem in answers if problem is not None]
        if problems:
            raise CheckpointError(problems[0]) from save.error
        return self._clock() - started if any(busy for busy, _ in answers) else None

    def close(self) -> None:
        """Let this rank's save come to its end, whatever became of the run; not collective.

        The threads of other ranks go on while theirs do, and fail when a process is gone.
        """
        if self._save is None:
            return
        self._save.join()
        if self._save.problem is not None:
            logger.warning("%s", self._save.problem)
        self._save = None

    def _copy(self, name: str, values: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != values.shape or buffer.dtype != values.dtype:
            # Pinned memory is what a device copies to at full speed.
            is_pinned = values.device.type != "cpu"
            buffer = torch.empty(values.shape, dtype=values.dtype, pin_memory=is_pinned)
            self._buffers[name] = buffer
        return buffer.copy_(values.detach())


class _Save:
    """One save in its thread, and what became of it."""

    def __init__(self, directory: Path, work: Callable[[], None]) -> None:
        self._directory = directory
        self._work = work
        self.error: BaseException | None = None
        # Ends of processes wait for it in `close`; an interpreter that dies otherwise must not.
        self._thread = threading.Thread(target=self._run, name=directory.name, daemon=True)
        self._thread.start()

    @property
    def problem(self) -> str | None:
        """What went wrong, in a form that names the checkpoint."""
        if self.error is None or isinstance(self.error, CheckpointError):
            return None if self.error is None else str(self.error)
        return (
            f"checkpoint ({self._directory}) could not be completed in the background: "
            f"{type(self.error).__name__}: {self.error}. Run the same command again."
        )

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001  `finish` raises it on every rank
            self.error = error
