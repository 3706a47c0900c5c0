"""From a run's config to its engine: groups, recomputation, precision. Builds nothing itself."""

from __future__ import annotations

import logging

import torch

from models.layouts import parameter_layouts
from parallel.backend.base import Backend
from parallel.config import Precision
from parallel.engine import TorchEngine
from parallel.engine_protocol import ParamGroup
from parallel.mesh import Mesh
from training.config import RunConfig
from training.ineffective import ineffective_options
from training.layout import cut_stages
from training.layout_table import layout_lines
from training.metrics import Throughput
from training.optimizer import build_groups
from training.origin import Origin
from training.recomputation import recomputation
from training.teacher import load_teacher, teacher_spec
from training.weight_source import WeightSource

logger = logging.getLogger(__name__)

DTYPES = {
    Precision.fp64: torch.float64,
    Precision.fp32: torch.float32,
    Precision.bf16: torch.bfloat16,
}


def build_engine(
    config: RunConfig,
    backend: Backend,
    mesh: Mesh,
    origin: Origin,
    teacher: WeightSource | None = None,
) -> TorchEngine:
    """The engine with its parameters drawn from the seed, or NaN where a checkpoint fills them.

    A teacher's weights are loaded. Collective.

    Raises:
        ValueError: a freeze pattern that matches nothing, or that leaves nothing to train.
    """
    layouts = parameter_layouts(config.model)
    names = [name for name, layout in layouts.items() if not layout.is_state]
    groups = build_groups(names, config.optimizer, new_parameters=origin.new_parameters)
    _describe_groups(groups, len(names))
    stages = cut_stages(config)
    engine = TorchEngine(
        config.model,
        mesh=mesh,
        groups=groups,
        rule=config.optimizer,
        spiking=config.spiking,
        precision=config.training.precision,
        parallel=config.parallel,
        stages=stages,
        kernels=backend.kernels(),
        recompute=recomputation(config.training, config.model, stages),
        seed=None if origin.resume is not None else config.seed,
        teacher=teacher_spec(config, teacher),
        loss_chunk_tokens=config.training.loss_chunk_tokens,
    )
    load_teacher(engine.teacher, teacher, mesh)
    return engine


def throughput(config: RunConfig, backend: Backend, mesh: Mesh) -> Throughput:
    """Rates against the peak of all ranks' devices."""
    peak = backend.peak_flops(DTYPES[config.training.precision])
    return Throughput(config.model, None if peak is None else peak * mesh.size)


def memory_bytes(backend: Backend) -> int | None:
    """Peak memory of this rank's device, or what is in use where there is no peak."""
    memory = backend.memory()
    return memory.peak_bytes if memory.peak_bytes is not None else memory.used_bytes


def describe(config: RunConfig, backend: Backend, mesh: Mesh) -> None:
    """Log what will be trained, on what."""
    for line in backend.explain():
        logger.info("%s", line)
    names = backend.kernels().names
    if mesh.is_main:
        kernels = (names["linear_attention"], names["softmax_attention"])
        for line in layout_lines(config, mesh, kernels=kernels):
            logger.info("%s", line)
        for line in ineffective_options(config):
            logger.warning("%s", line)


def _describe_groups(groups: list[ParamGroup], num_names: int) -> None:
    for group in groups:
        logger.info(
            "%d parameters: weight decay %g, lr x %g",
            len(group.names), group.weight_decay, group.lr_factor,
        )  # fmt: skip
    frozen = num_names - sum(len(group.names) for group in groups)
    if frozen:
        logger.info("%d parameters are frozen", frozen)
