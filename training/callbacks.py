"""Who hears about a run besides its row files: the terminal and wandb. Rank 0 only.

A listener may fail without hurting the run: wandb that is missing, offline or broken is a warning.
"""

from __future__ import annotations

import logging
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from training.config import LoggingConfig, WandbMode

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]


class Callback(Protocol):
    """Listens to one run."""

    def on_step(self, row: Row) -> None:
        """A `metrics.jsonl` row was written."""

    def on_evaluation(self, row: Row) -> None:
        """An `eval.jsonl` row was written."""

    def close(self) -> None:
        """The run ended, well or not."""


class Progress:
    """A progress line that rewrites itself on a terminal, a plain line every so often elsewhere."""

    def __init__(
        self,
        *,
        total_steps: int,
        first_step: int,
        interval_steps: int,
        stream: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total_steps
        self._first = first_step
        self._interval = max(1, interval_steps)
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._started = clock()
        self._is_terminal = self._stream.isatty()

    def on_step(self, row: Row) -> None:
        """Show the row."""
        step = int(row["step"])
        line = self._line(row, step)
        if self._is_terminal:
            self._stream.write(f"\r\x1b[K{line}" + ("\n" if step >= self._total else ""))
            self._stream.flush()
        elif step % self._interval == 0 or step >= self._total or step == self._first + 1:
            logger.info("%s", line)

    def on_evaluation(self, row: Row) -> None:
        """Show the perplexity."""
        start = "\r\x1b[K" if self._is_terminal else ""
        if start:
            self._stream.write(start)
        logger.info("step %d held-out perplexity %.4g", row["step"], row["perplexity"])

    def close(self) -> None:
        """Nothing is open."""

    def _line(self, row: Row, step: int) -> str:
        done = step - self._first
        left = (self._clock() - self._started) / max(1, done) * (self._total - step)
        return (
            f"step {step}/{self._total} [{row['stage']}] loss {row['loss']:.4f} "
            f"grad {row['grad_norm']:.3g} lr {row['lr']:.3g} "
            f"{row['tokens_per_second']:,.0f} tokens/s, {duration(left)} left"
        )


class Wandb:
    """Sends rows to wandb; the first failure switches it off with a warning."""

    def __init__(self, run: Any) -> None:
        self._run: Any = run

    @classmethod
    def start(
        cls,
        config: LoggingConfig,
        *,
        run_dir: Path,
        run_id: str,
        name: str,
        settings: Mapping[str, Any],
    ) -> Wandb | None:
        """Open (or continue) the dashboard `run_id`; None when disabled, missing or broken.

        `settings` is the resolved run config that wandb shows.
        """
        if config.wandb is WandbMode.disabled:
            return None
        try:
            return cls(_open_wandb(config, run_dir, run_id, name, settings))
        except Exception as error:  # noqa: BLE001  a dashboard never kills a run
            logger.warning(
                "logging.wandb (%s) is off for this run: %s. Install or repair wandb, or set "
                "logging.wandb=disabled.", config.wandb.value, error,
            )  # fmt: skip
            return None

    def on_step(self, row: Row) -> None:
        """Send a step row."""
        self._send(row)

    def on_evaluation(self, row: Row) -> None:
        """Send an evaluation row under `eval/`."""
        self._send({"step": row["step"], **{f"eval/{k}": v for k, v in row.items() if k != "step"}})

    def close(self) -> None:
        """Finish the dashboard."""
        self._guarded(lambda run: run.finish())

    def _send(self, row: Row) -> None:
        numbers = {k: v for k, v in row.items() if v is not None}
        self._guarded(lambda run: run.log(numbers))

    def _guarded(self, action: Callable[[Any], object]) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:  # noqa: BLE001  a dashboard never kills a run
            logger.warning("wandb failed and is off for the rest of this run: %s", error)
            self._run = None


def new_run_id() -> str:
    """Return a fresh dashboard id; checkpoints keep it."""
    return secrets.token_hex(4)


def duration(seconds: float) -> str:
    """Return `1:02:03` or `02:03`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"


def notify(callbacks: Sequence[Callback], event: str, row: Row) -> None:
    """Tell every listener one event (`on_step` or `on_evaluation`)."""
    for callback in callbacks:
        getattr(callback, event)(row)


def _open_wandb(
    config: LoggingConfig, run_dir: Path, run_id: str, name: str, settings: Mapping[str, Any]
) -> Any:
    import wandb

    run = wandb.init(
        project=config.project,
        name=name,
        id=run_id,
        resume="allow" if config.wandb is WandbMode.online else None,
        dir=str(run_dir),
        mode=config.wandb.value,
        config=dict(settings),
        save_code=False,
        settings=wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
            init_timeout=30,
        ),
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run
