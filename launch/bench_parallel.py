"""Rows of `launch.bench` about many ranks: the engine on one, then each layout of 2 and of 4."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from launch.bench_engine import EngineRun, plain_step, run_config
from launch.bench_layouts import LAYOUTS, RankJob, measure
from launch.bench_ranks import on_ranks
from launch.bench_rows import Row, Setting, compare
from models.config import ModelConfig
from parallel.axes import axis_sizes
from parallel.backend.cpu import CpuBackend
from parallel.config import ParallelConfig
from parallel.mesh import close, init
from training.layout import check_layout
from training.stages import build_plan

logger = logging.getLogger(__name__)

ENGINE_GOAL = 1.05
"""On one process the engine may cost this much more than a loop without it."""


def parallel(setting: Setting) -> Iterator[Row]:
    """Each layout of 2 and 4 ranks against one process at the same total work, and its bytes.

    Ranks share out the threads that one process has, at least one each. Times are of ranks that
    share the processor, unless each has a device; bytes are the same everywhere.
    """
    yield engine_row(setting)
    setting = replace(setting, model=with_heads_for(setting.model, max(LAYOUTS)))
    for num_ranks, layouts in LAYOUTS.items():
        fitting = possible(setting, num_ranks, layouts)
        if fitting:
            job = RankJob(setting, fitting, torch.get_num_threads())
            yield from on_ranks(measure, job, num_ranks)


def engine_row(setting: Setting) -> Row:
    """What the engine costs where there is nothing to share."""
    mesh = init(setting.backend, ParallelConfig(), environment={})
    try:
        config = run_config(setting, ParallelConfig(), num_tokens=setting.short_tokens)
        run = EngineRun.start(config, setting, mesh)
        return compare(
            f"engine vs plain loop, one process, {run.num_targets} tokens",
            run.step,
            plain_step(config, setting),
            setting,
            goal=ENGINE_GOAL,
            unit="ms",
        )
    finally:
        close(mesh)


def with_heads_for(model: ModelConfig, tp: int) -> ModelConfig:
    """The model with enough KV heads for `tp`, where its query heads allow them."""
    heads = math.lcm(model.num_key_value_heads, tp)
    if heads == model.num_key_value_heads or model.num_attention_heads % heads:
        return model
    logger.info("%d KV heads instead of %d, for tp %d", heads, model.num_key_value_heads, tp)
    return replace(model, num_key_value_heads=heads)


def possible(
    setting: Setting, num_ranks: int, layouts: Mapping[str, ParallelConfig]
) -> dict[str, ParallelConfig]:
    """The layouts that this model and this machine can run; the others are named with a reason."""
    if not isinstance(setting.backend, CpuBackend) and setting.backend.num_devices() < num_ranks:
        logger.warning(
            "left out, %d devices are fewer than %d ranks: %s",
            setting.backend.num_devices(), num_ranks, "; ".join(layouts),
        )  # fmt: skip
        return {}
    fitting = {}
    for name, layout in layouts.items():
        config = run_config(setting, layout)
        _, dp_replicate, dp_shard, _ = axis_sizes(layout, num_ranks)
        try:
            check_layout(config, build_plan(config), dp_size=dp_replicate * dp_shard)
        except ValueError as error:
            logger.warning("left out, %s: %s", name, error)
        else:
            fitting[name] = layout
    return fitting
