"""A run as the planner takes it: what one curriculum stage trains, and what its ranks will hold."""

from __future__ import annotations

from models.layer_pattern import FfnKind
from models.layouts import parameter_layouts
from parallel.config import Precision
from parallel.planned import Assignment, Job, Layout
from parallel.rank_memory import RankMemory, rank_memory
from training.config import OptimizerName, RunConfig
from training.layout import cut_stages
from training.optimizer import frozen_names
from training.recomputation import recomputation
from training.stages import build_plan


def planned_job(config: RunConfig, stage_name: str, *, kernels: tuple[str, str]) -> Job:
    """What a curriculum stage trains; `kernels` name the linear and the softmax attention kernel.

    Raises:
        ValueError: pipeline stages that the model cannot be cut into.
    """
    stage, training = config.stages[stage_name], config.training
    return Job(
        model=config.model,
        spiking=config.spiking,
        precision=training.precision,
        length=stage.sequence_length,
        rows=stage.rows_per_step,
        microbatch_rows=training.microbatch_rows,
        recompute=recomputation(training, config.model, cut_stages(config)),
        loss_chunk_tokens=training.loss_chunk_tokens,
        frozen=frozen_names(list(parameter_layouts(config.model)), config.optimizer.freeze),
        has_moments=config.optimizer.name is OptimizerName.adamw,
        kernels=kernels,
    )


def planned_kernels(kernels: tuple[str, str], precision: Precision) -> tuple[str, str]:
    """A device's linear and softmax kernel, or what computes where they lack the precision."""
    linear, softmax = kernels
    if precision is Precision.fp64:
        linear = "chunked"
    if precision is not Precision.bf16:
        softmax = "blocked"
    return linear, softmax


def left_out(config: RunConfig) -> list[str]:
    """What of a run its plan does not count, as sentences."""
    lines = []
    if config.training.teacher is not None:
        lines.append(
            f"not counted: training.teacher ({config.training.teacher}), its weights, activations, "
            "communication and time"
        )
    if config.optimizer.freeze:
        lines.append(
            "activations and time are counted as if every parameter were trained: optimizer.freeze "
            "saves some"
        )
    has_experts = FfnKind.mixture_of_experts in config.model.layers.ffns
    if has_experts and config.model.moe.capacity_factor is None:
        lines.append(
            "experts are counted as if routers loaded them evenly: without moe.capacity_factor a "
            "rank of parallel.ep that is sent more rows holds and computes more"
        )
    return lines


def planned_memory(
    config: RunConfig, *, num_ranks: int, kernels: tuple[str, str]
) -> list[RankMemory]:
    """Memory of the fullest rank of each pp coordinate, in the curriculum stage that takes most.

    Without what `left_out` names.
    """
    layout, cuts = Layout.of(config.parallel, num_ranks), cut_stages(config)
    kernels = planned_kernels(kernels, config.training.precision)
    stages = []
    for stage in build_plan(config).stages:
        given = Assignment.of(planned_job(config, stage.name, kernels=kernels), layout, stages=cuts)
        stages.append([rank_memory(given, rank) for rank in range(layout.pp)])
    return [max(ranks, key=lambda each: each.peak) for ranks in zip(*stages, strict=True)]
