"""The run folder on rank 0: `config.yaml`, the row files cut back to the checkpoint, listeners."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from parallel.checkpoint import set_aside
from parallel.mesh import Mesh
from training.callbacks import Callback, Progress, Wandb
from training.config import RunConfig
from training.health import FAILED, STOPPED
from training.metrics import RowFile, Sinks
from training.resolved_config import plain, write_config
from training.stages import StagePlan
from training.state import TrainState

logger = logging.getLogger(__name__)

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
EVALUATIONS = "eval.jsonl"
LOCK_WAIT_SECONDS = 20.0
"""How long a new job waits for one that is leaving: ranks whose launcher was killed save first."""


@contextmanager
def held(run_dir: Path, mesh: Mesh) -> Iterator[None]:
    """Keep other jobs out of the run folder; the kernel frees it with the process. Collective.

    Raises:
        ValueError: another job of this machine trains there.
        RankError: the folder cannot be written.
    """
    stream = mesh.agree(
        f"locking run_dir ({run_dir})", lambda: _locked(run_dir) if mesh.is_main else None
    )
    try:
        yield
    finally:
        if stream is not None:
            stream.close()


def _locked(run_dir: Path) -> IO[str]:
    # Beside the folder, so that a run which is refused leaves no folder behind.
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    stream = run_dir.with_name(f".{run_dir.name}.lock").open("a+")
    deadline = time.monotonic() + LOCK_WAIT_SECONDS
    while True:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError as error:
            if time.monotonic() >= deadline:
                stream.seek(0)
                owner = stream.read().strip() or "an unknown process"
                stream.close()
                raise ValueError(
                    f"run_dir ({run_dir}) must belong to one job: {owner} trains there. Wait for "
                    "it, end it, or choose another run_dir."
                ) from error
            time.sleep(0.5)
    stream.truncate(0)
    stream.write(f"process {os.getpid()} on {os.uname().nodename}\n")
    stream.flush()
    return stream


def open_folder(
    config: RunConfig, state: TrainState, run_id: str, plan: StagePlan, mesh: Mesh
) -> Sinks:
    """Write `config.yaml`, drop rows after `state`, start the listeners. Collective.

    Ranks above 0 get sinks that swallow everything.

    Raises:
        RankError: the folder cannot be written.
    """
    sinks = mesh.agree(
        f"opening run_dir ({config.run_dir})",
        lambda: _open(config, state, run_id, plan) if mesh.is_main else None,
    )
    return sinks if sinks is not None else Sinks(None, None, ())


def _open(config: RunConfig, state: TrainState, run_id: str, plan: StagePlan) -> Sinks:
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    for name in (STOPPED, FAILED):
        (run_dir / name).unlink(missing_ok=True)
    for path in set_aside(run_dir, after_step=state.step):
        logger.warning("%s is beyond step %d, where this run goes on; kept aside", path, state.step)
    write_config(run_dir / CONFIG, config)
    wandb = Wandb.start(
        config.logging,
        run_dir=run_dir,
        run_id=run_id,
        name=config.experiment,
        settings=plain(config),
    )
    progress = Progress(
        total_steps=plan.total_steps,
        first_step=state.step,
        interval_steps=config.logging.interval_steps,
    )
    listeners: tuple[Callback, ...] = (progress,) if wandb is None else (progress, wandb)
    return Sinks(
        RowFile(run_dir / METRICS, last_step=state.step),
        RowFile(run_dir / EVALUATIONS, last_step=state.step),
        listeners,
    )
