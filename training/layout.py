"""What a layout asks of a run, checked before anything is loaded.

Owns no mechanism: what divides what, and which combinations no engine can run.
"""

from __future__ import annotations

from parallel.config import PipelineSchedule
from parallel.experts import check_expert_parallel
from parallel.pipeline_cut import StageCut, check_microbatches, cut
from parallel.split_backward import check_split_backward
from parallel.tensor_parallel import check_sequence_length, check_sinks, check_tensor_parallel
from training.config import RunConfig
from training.recomputation import check_recomputation
from training.stages import StagePlan, check_rows


def cut_stages(config: RunConfig) -> tuple[StageCut, ...]:
    """The pipeline stages, by the cost of rows of the first curriculum stage.

    Raises:
        ValueError: more stages than layers, or a list that is not the model's.
    """
    first = next(iter(config.stages.values()))
    return cut(config.model, config.parallel, sequence_length=first.sequence_length)


def check_layout(config: RunConfig, plan: StagePlan, *, dp_size: int) -> None:
    """Refuse a layout that the model, the curriculum or the schedule cannot run.

    Raises:
        ValueError: naming the key, both numbers and the nearest valid values.
    """
    parallel, training = config.parallel, config.training
    check_tensor_parallel(config.model, parallel.tp)
    check_expert_parallel(config.model, parallel.ep)
    check_sinks(config.model, parallel)
    stages = cut_stages(config)
    check_rows(plan, dp_size=dp_size, microbatch_rows=training.microbatch_rows)
    for stage in plan.stages:
        check_sequence_length(stage.config.sequence_length, parallel, stage=stage.name)
        if parallel.pp > 1:
            count = stage.config.rows_per_step // (dp_size * training.microbatch_rows)
            check_microbatches(parallel.schedule, count, parallel.pp, parallel.stages_per_rank)
    if parallel.pp > 1 and parallel.schedule is PipelineSchedule.zero_bubble:
        check_split_backward()
    check_recomputation(training, config.model, parallel, stages)
