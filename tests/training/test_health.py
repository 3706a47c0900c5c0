"""Messages of a diverged step, and stop signals."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import pytest

from training.health import (
    LAUNCHER_VARIABLE,
    STOP_SIGNALS,
    StopRequest,
    diverged,
    write_status,
)


def test_a_diverged_step_names_step_stage_and_samples() -> None:
    error = diverged(RuntimeError("loss (nan) must be finite."), step=7, stage="cpt_8k",
                     sample_ids=["a:0:1", "b:0:2"])  # fmt: skip
    assert "loss (nan) must be finite. At step 7 of stage cpt_8k, on samples a:0:1, b:0:2." in str(
        error
    )
    assert "newest checkpoint are untouched" in str(error)


def test_long_lists_of_samples_are_cut_and_say_so() -> None:
    error = diverged(RuntimeError("x"), step=1, stage="a", sample_ids=list(range(20)))
    assert "0, 1, 2, 3, 4, 5, 6, 7 and 12 more (all in failed.json)" in str(error)


def test_each_stop_signal_is_noted_and_the_old_handler_comes_back() -> None:
    for number in STOP_SIGNALS:
        before = signal.getsignal(number)
        with StopRequest() as stop:
            assert stop.reason is None
            os.kill(os.getpid(), number)
            assert stop.reason == number.name
        assert signal.getsignal(number) == before


def test_outside_the_main_thread_nothing_is_installed() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def body() -> None:
        with StopRequest() as stop:
            seen.append((stop.reason, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [(None, before)]


def test_a_lost_launcher_is_a_reason_to_stop_under_torchrun_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(LAUNCHER_VARIABLE, raising=False)
    alone = StopRequest()
    monkeypatch.setenv(LAUNCHER_VARIABLE, "job")
    launched = StopRequest()
    assert launched.reason is None
    monkeypatch.setattr(os, "getppid", lambda: -1)
    assert launched.reason == "the end of its launcher"
    assert alone.reason is None


def test_a_status_file_is_written_whole(tmp_path: Path) -> None:
    write_status(tmp_path, "stopped.json", {"reason": "SIGTERM", "step": 3})
    assert json.loads((tmp_path / "stopped.json").read_text()) == {"reason": "SIGTERM", "step": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["stopped.json"]
