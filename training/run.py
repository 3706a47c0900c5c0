"""A training run from its config to its last checkpoint: the table of contents of this package."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch

from parallel import mesh as meshes
from parallel.backend.base import Backend
from parallel.backend.detect import detect
from parallel.mesh import Mesh
from training.checkpoint import Checkpoints, manifest_facts
from training.config import RunConfig
from training.engine_setup import build_engine, describe, memory_bytes, throughput
from training.health import StopRequest
from training.heldout import HeldOut
from training.layout import check_layout
from training.loop import Loop
from training.origin import find_origin, restore
from training.resolved_config import check_unchanged
from training.run_folder import CONFIG, held, open_folder
from training.stage_data import open_data
from training.stages import build_plan
from training.step import Stepper
from training.teacher import open_teacher

logger = logging.getLogger(__name__)


def run(config: RunConfig) -> bool:
    """Train through the stages of `config`, resuming from the newest checkpoint of its `run_dir`.

    Works alone and under torchrun; collective. Returns True when all steps are done, and False when
    a rank was asked to stop (SIGTERM, SIGUSR1) or lost its launcher; in both cases after saving.

    Raises:
        ValueError: config, data or weights that do not fit together, before anything is loaded.
        TrainingDivergedError: a loss or gradient that is not finite.
        CheckpointError: a checkpoint that cannot be read or written.
    """
    stop = StopRequest()  # notes who started this process, so as early as can be
    plan = build_plan(config)
    backend = detect(config.backend)
    run_dir = Path(config.run_dir)
    with joined(backend, config) as mesh, held(run_dir, mesh):
        check_layout(config, plan, dp_size=mesh.dp_size)
        describe(config, backend, mesh)
        data = open_data(plan, config, mesh)
        origin = find_origin(config, data, mesh)
        if origin.resume is not None:
            mesh.agree("comparing the config", lambda: check_unchanged(run_dir / CONFIG, config))
        teacher = open_teacher(config, data, mesh, origin)
        engine = build_engine(config, backend, mesh, origin, teacher)
        state = restore(engine, origin, config, plan, data, mesh)
        stepper = Stepper(
            engine=engine,
            spiking=config.spiking,
            throughput=throughput(config, backend, mesh),
            window_tokens=config.model.visible_window_tokens,
            microbatch_rows=config.training.microbatch_rows,
            memory_bytes=lambda: memory_bytes(backend),
        )
        held_out = HeldOut.open(config, plan, data, engine, mesh)
        facts = manifest_facts(config, data, origin, teacher)
        checkpoints = Checkpoints.open(config, facts, data.tokenizer, engine, mesh)
        folder = open_folder(config, state, origin.run_id, plan, mesh)
        with closing(folder) as sinks, closing(checkpoints):
            loop = Loop(mesh, plan, data, stepper, checkpoints, sinks, held_out, stop)
            state = loop.fit(state)
        logger.info("step %d of %d, %d tokens", state.step, plan.total_steps, state.tokens)
        return state.step >= plan.total_steps


@contextmanager
def joined(backend: Backend, config: RunConfig) -> Iterator[Mesh]:
    """Join the other ranks and leave them at the end.

    After an error only a lone process leaves: with others the launcher ends them all, and waiting
    for ranks that hang in a collective would hide the error.
    """
    if config.training.num_threads is not None:
        torch.set_num_threads(config.training.num_threads)
    mesh = meshes.init(backend, config.parallel)
    try:
        yield mesh
    except BaseException:
        if mesh.size == 1:
            meshes.close(mesh)
        raise
    meshes.close(mesh)
