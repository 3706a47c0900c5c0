"""The checkpoint behind `training.teacher`: checked early, loaded into the engine's parts."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.lesson import Goals
from parallel.boxes import Box
from parallel.experts import check_expert_parallel
from parallel.mesh import Mesh
from parallel.teacher import Teacher, TeacherSpec, check_teacher
from parallel.tensor_parallel import check_sinks, check_tensor_parallel
from training.config import RunConfig
from training.origin import Origin
from training.stage_data import RunData
from training.weight_source import WeightSource, kept_checkpoint, open_weights
from training.weights import check_same_tokenizer

logger = logging.getLogger(__name__)


def open_teacher(
    config: RunConfig, data: RunData, mesh: Mesh, origin: Origin
) -> WeightSource | None:
    """Look at the teacher of a run, if it has one; loads nothing. Collective.

    A resumed run goes on with the checkpoint of its teacher that it began with, as long as that is
    there; newer ones of a teacher that trains on are for new runs.

    Raises:
        ValueError: a folder without weights, another tokenizer, or a model that the student cannot
            learn from under this layout.
        CheckpointError: a damaged checkpoint.
    """
    if config.training.teacher is None:
        return None
    before: Mapping[str, Any] | None = origin.manifest.get("teacher")
    path = Path(config.training.teacher)
    if before is not None:
        action = f"looking for the run's teacher ({before['path']})"
        path = mesh.broadcast(mesh.agree(action, lambda: kept_checkpoint(path, before)) or path)
    source = open_weights(path, key="training.teacher", mesh=mesh)
    check_same_tokenizer(source.path, source.tokenizer_sha256, data.tokenizer.sha256)
    check_teacher(source.model, config.model, goals(config), pp=config.parallel.pp)
    check_tensor_parallel(source.model, config.parallel.tp)
    check_expert_parallel(source.model, config.parallel.ep)
    check_sinks(source.model, config.parallel)
    if mesh.is_main and before is not None:
        _warn_if_replaced(source, before)
    if mesh.is_main and config.distill.offload and mesh.device.type == "cpu":
        logger.warning("distill.offload (true) has no effect on a CPU. Set it to false.")
    return source


def _warn_if_replaced(source: WeightSource, before: Mapping[str, Any]) -> None:
    found, expected = source.fingerprint(), str(before["fingerprint"])
    if found != expected:
        logger.warning(
            "training.teacher (%s, fingerprint %s) has other weights than those that this run has "
            "learned from (%s, fingerprint %s): from here on it learns something else. Name the "
            "old checkpoint, if it is anywhere; for the new one choose a new run_dir.",
            source.path, found[:12], before["path"], expected[:12],
        )  # fmt: skip


def teacher_spec(config: RunConfig, source: WeightSource | None) -> TeacherSpec | None:
    """What the engine is told about the teacher."""
    if source is None:
        return None
    return TeacherSpec(source.model, goals(config), offload=config.distill.offload)


def goals(config: RunConfig) -> Goals:
    """What is learned from the teacher, and how much it counts."""
    distill = config.distill
    return Goals(kl=distill.kl, hidden=distill.hidden, temperature=distill.temperature)


def load_teacher(teacher: Teacher | None, source: WeightSource | None, mesh: Mesh) -> None:
    """Fill this rank's part of the teacher. Collective.

    Raises:
        ValueError: a weight that the source does not have.
        RankError: files that some ranks cannot read.
    """
    if teacher is None or source is None:
        return
    boxes = teacher.parameters
    action = f"loading training.teacher ({source.path})"
    mesh.agree(action, lambda: _fill(boxes, source))
    logger.info("teacher: %s, %s", source.path, source.model.layers.describe())


def _fill(boxes: Mapping[str, Box], source: WeightSource) -> None:
    missing = sorted(boxes.keys() - source.shapes.keys())
    if missing:
        raise ValueError(
            f"training.teacher ({source.path}) must hold every weight of its model: "
            f"{missing[0]} is not there. Give a whole checkpoint."
        )
    for name, tensor in source.read(list(boxes)):
        boxes[name].fill(tensor)
