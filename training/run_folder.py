"""The run folder on rank 0: `config.yaml`, the row files cut back to the checkpoint, listeners."""

from __future__ import annotations

from pathlib import Path

from parallel.mesh import Mesh
from training.callbacks import Callback, Progress, Wandb
from training.config import RunConfig
from training.health import FAILED, STOPPED
from training.metrics import RowFile, Sinks
from training.resolved_config import plain, write_config
from training.stages import StagePlan
from training.state import TrainState

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
EVALUATIONS = "eval.jsonl"


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
