"""What listeners show and send, and that a broken dashboard is only a warning."""

from __future__ import annotations

import builtins
import io
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from training.callbacks import Progress, Wandb, duration, new_run_id
from training.config import LoggingConfig, WandbMode

ROW = {
    "step": 4, "stage": "main", "loss": 1.25, "grad_norm": 0.5, "lr": 1e-3,
    "tokens_per_second": 1234.5, "mfu": None,
}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def progress(stream: io.StringIO, interval_steps: int = 5) -> Progress:
    times = iter([0.0, *[10.0] * 99])
    return Progress(
        total_steps=14, first_step=2, interval_steps=interval_steps, stream=stream,
        clock=lambda: next(times),
    )  # fmt: skip


def test_plain_lines_come_at_the_first_step_the_interval_and_the_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    shown = progress(io.StringIO())
    with caplog.at_level(logging.INFO):
        for step in range(3, 15):
            shown.on_step({**ROW, "step": step})
    starts = [record.getMessage().split(" [")[0] for record in caplog.records]
    assert starts == ["step 3/14", "step 5/14", "step 10/14", "step 14/14"]


def test_a_line_tells_where_the_run_is_and_how_long_is_left(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        progress(io.StringIO(), interval_steps=1).on_step(ROW)
    assert caplog.messages == [
        "step 4/14 [main] loss 1.2500 grad 0.5 lr 0.001 1,234 tokens/s, 00:50 left"
    ]


def test_a_terminal_has_one_line_that_rewrites_itself() -> None:
    stream = Terminal()
    shown = progress(stream)
    shown.on_step(ROW)
    shown.on_step({**ROW, "step": 14})
    assert stream.getvalue().count("\r\x1b[K") == 2
    assert stream.getvalue().endswith("00:00 left\n")


def test_an_evaluation_is_a_line_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    stream = Terminal()
    with caplog.at_level(logging.INFO):
        progress(stream).on_evaluation({"step": 4, "perplexity": 12.345})
    assert caplog.messages == ["step 4 held-out perplexity 12.35"]
    assert stream.getvalue() == "\r\x1b[K"


@pytest.mark.parametrize(("seconds", "text"), [(5.9, "00:05"), (65, "01:05"), (3725, "1:02:05")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


class FakeRun:
    """A dashboard that fails from the n-th call on."""

    def __init__(self, fail_at: int = 99) -> None:
        self.logged: list[Mapping[str, Any]] = []
        self.finished = 0
        self.fail_at = fail_at

    def log(self, row: Mapping[str, Any]) -> None:
        if len(self.logged) + 1 >= self.fail_at:
            raise ConnectionError("the server closed the connection")
        self.logged.append(row)

    def finish(self) -> None:
        self.finished += 1


def test_wandb_gets_rows_without_nulls_and_evaluations_under_their_own_name() -> None:
    run = FakeRun()
    wandb = Wandb(run)
    wandb.on_step(ROW)
    wandb.on_evaluation({"step": 4, "perplexity": 2.0})
    wandb.close()
    assert run.logged[0] == {key: value for key, value in ROW.items() if key != "mfu"}
    assert run.logged[1] == {"step": 4, "eval/perplexity": 2.0}
    assert run.finished == 1


def test_a_dying_dashboard_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    run = FakeRun(fail_at=2)
    wandb = Wandb(run)
    for _ in range(4):
        wandb.on_step(ROW)
    wandb.close()
    assert len(run.logged) == 1
    assert run.finished == 0
    assert caplog.messages == [
        "wandb failed and is off for the rest of this run: the server closed the connection"
    ]


def start(tmp_path: Path, mode: WandbMode) -> Wandb | None:
    return Wandb.start(
        LoggingConfig(wandb=mode), run_dir=tmp_path, run_id="abc", name="x", settings={}
    )


def test_a_missing_wandb_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = builtins.__import__

    def without_wandb(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "wandb":
            raise ImportError("No module named 'wandb'")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_wandb)
    assert start(tmp_path, WandbMode.offline) is None
    assert "logging.wandb (offline) is off for this run: No module named 'wandb'" in caplog.text


def test_disabled_wandb_is_not_even_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[object] = []
    monkeypatch.setattr("training.callbacks._open_wandb", lambda *given: opened.append(given))
    assert start(tmp_path, WandbMode.disabled) is None
    assert opened == []


def test_offline_wandb_writes_into_the_run_folder_under_the_given_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    wandb = start(tmp_path, WandbMode.offline)
    assert wandb is not None
    wandb.on_step(ROW)
    wandb.close()
    folders = [path for path in (tmp_path / "wandb").iterdir() if path.name.startswith("offline")]
    assert len(folders) == 1
    assert folders[0].name.endswith("-abc")
    assert (folders[0] / "run-abc.wandb").stat().st_size > 0


def test_run_ids_differ() -> None:
    assert new_run_id() != new_run_id()
