"""Where a run starts: at its own newest checkpoint, at somebody's weights, or at random ones."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.layouts import parameter_shapes
from parallel.checkpoint import CheckpointError, newest_complete, read_manifest
from parallel.engine_protocol import Engine
from parallel.mesh import Mesh
from training.callbacks import new_run_id
from training.checkpoint import check_resumable, load_everything
from training.config import RunConfig
from training.stage_data import RunData
from training.stages import StagePlan
from training.state import TrainState
from training.weight_source import WeightSource, open_weights
from training.weights import (
    check_same_tokenizer,
    load_weights,
    match_weights,
    warn_of_differences,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Origin:
    """What a run starts from; with neither `resume` nor `source`, from random weights.

    `resume` is this run's own newest checkpoint and `manifest` its manifest. `source` is
    `init.checkpoint`. `new_parameters` are the names that conversion, or this warm start, added.
    `run_id` is the dashboard's, and `weights` tells path, fingerprint and base format of the
    weights that the run began with, None for random ones.
    """

    resume: Path | None
    manifest: Mapping[str, Any]
    source: WeightSource | None
    new_parameters: tuple[str, ...]
    run_id: str
    weights: Mapping[str, Any] | None


def find_origin(config: RunConfig, data: RunData, mesh: Mesh) -> Origin:
    """Look for a checkpoint to resume, then for weights to start from; loads nothing. Collective.

    Raises:
        ValueError: weights of another shape, unexplained names, another tokenizer.
        CheckpointError: checkpoints that are all damaged.
    """
    resume = newest_complete(Path(config.run_dir), mesh=mesh)
    if resume is not None:
        manifest = mesh.agree(f"reading {resume}", lambda: read_manifest(resume))
        new_parameters = tuple(manifest["new_parameters"])
        weights = manifest.get("weights")
        if mesh.is_main and weights is not None:
            warn_if_replaced(config.init.checkpoint, weights)
        return Origin(
            resume, manifest, None, new_parameters, str(manifest["wandb_run_id"]), weights
        )
    run_id = mesh.broadcast(new_run_id())
    if config.init.checkpoint is None:
        return Origin(None, {}, None, (), run_id, None)
    source = open_weights(config.init.checkpoint, key="init.checkpoint", mesh=mesh)
    check_same_tokenizer(source.path, source.tokenizer_sha256, data.tokenizer.sha256)
    shapes = parameter_shapes(config.model)
    report = match_weights(shapes, source, config.init)
    warn_of_differences(config.model, source)
    kept = tuple(name for name in source.new_parameters if name in shapes)
    new_parameters = (*kept, *report.new)
    return Origin(None, {}, source, new_parameters, run_id, source.identity())


def warn_if_replaced(checkpoint: str | None, weights: Mapping[str, Any]) -> None:
    """Say so when `init.checkpoint` no longer holds the weights that the run began with."""
    if checkpoint is None or not Path(checkpoint).is_dir():
        return
    try:
        found = open_weights(checkpoint, check_files=False).fingerprint()
    except (ValueError, OSError, CheckpointError) as error:
        logger.warning("init.checkpoint (%s) cannot be compared: %s", checkpoint, error)
        return
    if found != weights["fingerprint"]:
        logger.warning(
            "init.checkpoint (%s, fingerprint %s) has other weights than those that this run_dir "
            "began with (%s); the run goes on from its own. For the new ones choose a new run_dir.",
            checkpoint, found[:12], str(weights["fingerprint"])[:12],
        )  # fmt: skip


def restore(
    engine: Engine, origin: Origin, config: RunConfig, plan: StagePlan, data: RunData, mesh: Mesh
) -> TrainState:
    """Bring the engine to where the run starts and return that place. Collective.

    Raises:
        ValueError: other stages or other data than the checkpoint was trained on.
        CheckpointError: a checkpoint of another model.
    """
    if origin.resume is not None:
        state = TrainState.from_manifest(origin.manifest)
        mesh.agree(
            "comparing the run's stages and data",
            lambda: check_resumable(origin.manifest, state, plan, data),
        )
        load_everything(engine, origin.resume, origin.manifest, mesh)
        logger.info("resumed from %s after step %d", origin.resume, state.step)
        return state
    source = origin.source
    if source is not None:
        shapes = parameter_shapes(config.model)
        report = mesh.agree(
            f"loading init.checkpoint ({source.path})",
            lambda: load_weights(engine.parameters, shapes, source, config.init),
        )
        logger.info("weights from %s: %s", source.path, report.describe())
    else:
        logger.info("weights: random, seed %d", config.seed)
    return TrainState()
