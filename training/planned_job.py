"""A run as the planner takes it: what one curriculum stage trains, and what its ranks will hold."""

from __future__ import annotations

from models.layouts import parameter_layouts
from parallel.planned import Assignment, Job, Layout
from parallel.rank_memory import RankMemory, rank_memory
from training.config import OptimizerName, RunConfig
from training.layout import cut_stages
from training.optimizer import frozen_names
from training.recomputation import recomputation


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


def planned_memory(
    config: RunConfig, *, num_ranks: int, kernels: tuple[str, str]
) -> list[RankMemory]:
    """Memory of the fullest rank of each pp coordinate, in the curriculum stage that takes most.

    A teacher is not counted.
    """
    layout = Layout.of(config.parallel, num_ranks)
    stages = []
    for name in config.stages:
        given = Assignment.of(planned_job(config, name, kernels=kernels), layout)
        stages.append([rank_memory(given, rank) for rank in range(layout.pp)])
    return [max(ranks, key=lambda each: each.peak) for ranks in zip(*stages, strict=True)]
