"""The checkpoint behind `training.teacher`: checked early, loaded into the engine's parts."""

from __future__ import annotations

import logging

from models.lesson import Goals
from parallel.boxes import Box
from parallel.mesh import Mesh
from parallel.teacher import Teacher, TeacherSpec, check_teacher
from parallel.tensor_parallel import check_tensor_parallel
from training.config import RunConfig
from training.stage_data import RunData
from training.weight_source import WeightSource, open_weights
from training.weights import check_same_tokenizer

logger = logging.getLogger(__name__)


def open_teacher(config: RunConfig, data: RunData, mesh: Mesh) -> WeightSource | None:
    """Look at the teacher of a run, if it has one; loads nothing. Collective.

    Raises:
        ValueError: a folder without weights, another tokenizer, or a model that the student cannot
            learn from under this layout.
        CheckpointError: a damaged checkpoint.
    """
    if config.training.teacher is None:
        return None
    source = open_weights(config.training.teacher, mesh=mesh)
    check_same_tokenizer(source.path, source.tokenizer_sha256, data.tokenizer.sha256)
    check_teacher(source.model, config.model, goals(config), pp=config.parallel.pp)
    check_tensor_parallel(source.model, config.parallel.tp)
    if config.distill.offload and mesh.device.type == "cpu":
        logger.warning("distill.offload (true) has no effect on a CPU. Set it to false.")
    return source


def teacher_spec(config: RunConfig, source: WeightSource | None) -> TeacherSpec | None:
    """What the engine is told about the teacher."""
    if source is None:
        return None
    return TeacherSpec(source.model, goals(config), offload=config.distill.offload)


def goals(config: RunConfig) -> Goals:
    """What is learned from the teacher, and how much it counts."""
    distill = config.distill
    return Goals(kl=distill.kl, hidden=distill.hidden, temperature=distill.temperature)


def load_teacher(teacher: Teacher | None, source: WeightSource | None) -> None:
    """Fill this rank's part of the teacher.

    Raises:
        ValueError: a weight that the source does not have.
    """
    if teacher is None or source is None:
        return
    boxes: dict[str, Box] = dict(teacher.parameters)
    missing = sorted(boxes.keys() - source.shapes.keys())
    if missing:
        raise ValueError(
            f"training.teacher ({source.path}) must hold every weight of its model: "
            f"{missing[0]} is not there. Give a whole checkpoint."
        )
    for name, tensor in source.read(list(boxes)):
        boxes[name].fill(tensor)
    logger.info("teacher: %s, %s", source.path, source.model.layers.describe())
