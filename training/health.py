"""What ends a run early: numbers that are not finite, and a request to stop.

Owns detection and the messages. Saving is the loop's; agreeing on a stop over ranks is the step's.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SHOWN_SAMPLES = 8
LAUNCHER_VARIABLE = "TORCHELASTIC_RUN_ID"
STOPPED = "stopped.json"
FAILED = "failed.json"


class TrainingDivergedError(RuntimeError):
    """A loss or gradient that is not finite; parameters were not touched."""


def diverged(
    cause: Exception, *, step: int, stage: str, sample_ids: Sequence[object]
) -> TrainingDivergedError:
    """The error of a step (1 is the first) whose loss or gradient is not finite."""
    shown = ", ".join(str(sample) for sample in sample_ids[:SHOWN_SAMPLES])
    rest = len(sample_ids) - SHOWN_SAMPLES
    more = f" and {rest} more (all in failed.json)" if rest > 0 else ""
    return TrainingDivergedError(
        f"{cause} At step {step} of stage {stage}, on samples {shown}{more}. Parameters and the "
        "newest checkpoint are untouched. Lower the stage's lr, lengthen warmup_steps or look at "
        "these samples, then run the same command again."
    )


def write_status(run_dir: Path, name: str, content: dict[str, Any]) -> None:
    """Write a small JSON file of the run folder in one rename."""
    temporary = run_dir / f".{name}.tmp"
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, run_dir / name)


class StopRequest:
    """Notes SIGTERM and SIGUSR1 while it is entered, so that the loop can finish its step.

    Only the main thread can listen; elsewhere (tests, notebooks) nothing is installed. Ranks of a
    launcher that was killed stop too: nobody waits for them, and a new job may want the run folder.
    """

    def __init__(self) -> None:
        self._signal: str | None = None
        self._launcher = os.getppid() if LAUNCHER_VARIABLE in os.environ else None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    @property
    def reason(self) -> str | None:
        """Why to stop, None while there is no reason."""
        if self._signal is None and self._launcher not in (None, os.getppid()):
            return "the end of its launcher"
        return self._signal

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name
