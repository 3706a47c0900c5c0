"""Where a run starts: at its own newest checkpoint, at somebody's weights, or at random ones."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.layouts import parameter_layouts
from parallel.checkpoint import newest_complete, read_manifest
from parallel.engine_protocol import Engine
from parallel.mesh import Mesh
from training.callbacks import new_run_id
from training.checkpoint import check_resumable, load_everything
from training.config import RunConfig
from training.stage_data import RunData
from training.stages import StagePlan
from training.state import TrainState
from training.weights import (
    WeightSource,
    check_same_tokenizer,
    load_weights,
    match_weights,
    open_weights,
    warn_of_differences,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Origin:
    """What a run starts from; with neither `resume` nor `source`, from random weights.

    `resume` is this run's own newest checkpoint and `manifest` its manifest. `source` is
    `init.checkpoint`. `new_parameters` are the names that conversion, or this warm start, added.
    `run_id` is the dashboard's.
    """

    resume: Path | None
    manifest: Mapping[str, Any]
    source: WeightSource | None
    new_parameters: tuple[str, ...]
    run_id: str


def find_origin(config: RunConfig, data: RunData, mesh: Mesh) -> Origin:
    """Look for a checkpoint to resume, then for weights to start from; loads nothing. Collective.

    Raises:
        ValueError: weights of another shape, unexplained names, another tokenizer.
        CheckpointError: checkpoints that are all damaged.
    """
    resume = newest_complete(Path(config.run_dir), mesh=mesh)
    if resume is not None:
        manifest = read_manifest(resume)
        new_parameters = tuple(manifest["new_parameters"])
        return Origin(resume, manifest, None, new_parameters, str(manifest["wandb_run_id"]))
    run_id = mesh.broadcast(new_run_id())
    if config.init.checkpoint is None:
        return Origin(None, {}, None, (), run_id)
    source = open_weights(config.init.checkpoint)
    check_same_tokenizer(source.path, source.tokenizer_sha256, data.tokenizer.sha256)
    layouts = parameter_layouts(config.model)
    shapes = {name: layout.global_shape for name, layout in layouts.items()}
    report = match_weights(shapes, source, config.init)
    warn_of_differences(config.model, source)
    kept = tuple(name for name in source.new_parameters if name in shapes)
    return Origin(None, {}, source, (*kept, *report.new), run_id)


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
        check_resumable(origin.manifest, state, plan, data)
        load_everything(engine, origin.resume, origin.manifest, mesh)
        logger.info("resumed from %s after step %d", origin.resume, state.step)
        return state
    if origin.source is not None:
        report = load_weights(engine.parameters, origin.source, config.init)
        logger.info("weights from %s: %s", origin.source.path, report.describe())
    else:
        logger.info("weights: random, seed %d", config.seed)
    return TrainState()
