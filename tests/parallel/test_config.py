"""Layouts that contradict themselves are refused by what they say alone; what is derived."""

from __future__ import annotations

import re
from typing import Any

import pytest

from parallel.axes import axis_sizes
from parallel.config import EngineConfig, EngineName, ParallelConfig, PipelineSchedule, Shard

GPIPE, INTERLEAVED = PipelineSchedule.gpipe, PipelineSchedule.interleaved
ZERO_BUBBLE = PipelineSchedule.zero_bubble

REFUSED: list[tuple[dict[str, Any], str]] = [
    *(({name: 0}, f"parallel.{name} (0) must be at least 1.")
      for name in ("pp", "cp", "tp", "ep", "dp_replicate", "vocab_multiple")),
    *(({name: -2}, f"parallel.{name} (-2) must be at least 1, or null to derive it.")
      for name in ("dp", "dp_shard", "virtual_stages")),
    ({"cp": 2}, "parallel.cp (2) must be 1: this axis is not in this release. Leave it at 1."
     " Use dp, tp or pp for more ranks."),
    (
        {"sequence_parallel": True},
        "parallel.sequence_parallel (true) must come with parallel.tp above 1: got tp 1. Set "
        "parallel.tp, or parallel.sequence_parallel=false.",
    ),
    (
        {"shard": Shard.none, "dp_replicate": 2},
        "parallel.shard (none) must leave dp_replicate at 1 and dp_shard null, because it "
        "replicates over all dp ranks: got 2 and null. Leave them, or set parallel.shard to "
        "gradients or parameters.",
    ),
    ({"shard": Shard.none, "dp_shard": 4}, "over all dp ranks: got 1 and 4. Leave them"),
    (
        {"dp": 8, "dp_replicate": 2, "dp_shard": 3},
        "parallel.dp (8) must equal dp_replicate x dp_shard: got 2 x 3. Set it to 6, or leave dp "
        "or dp_shard null to derive it.",
    ),
    (
        {"dp": 5, "dp_replicate": 2},
        "parallel.dp (5) must be a multiple of parallel.dp_replicate: got 2. Set it to 4 or 6, or "
        "change parallel.dp_replicate.",
    ),
    ({"dp": 1, "dp_replicate": 2}, "got 2. Set it to 2, or change parallel.dp_replicate."),
    (
        {"pp": 1, "virtual_stages": 2, "schedule": INTERLEAVED},
        "parallel.virtual_stages (2) must be 1 for parallel.pp 1 with schedule interleaved. Use pp "
        "above 1 with schedule interleaved or zero_bubble, or leave it null.",
    ),
    ({"pp": 2, "virtual_stages": 3}, "(3) must be 1 for parallel.pp 2 with schedule one_f_one_b."),
    ({"pp": 2, "virtual_stages": 2, "schedule": GPIPE}, "for parallel.pp 2 with schedule gpipe."),
    (
        {"pp": 2, "virtual_stages": 1, "schedule": INTERLEAVED},
        "parallel.virtual_stages (1) must be at least 2 for schedule interleaved. Set it to 2 or "
        "null, or use schedule one_f_one_b.",
    ),
    (
        {"pp": 2, "stage_layers": [4]},
        "parallel.stage_layers ([4]) must give one number of layers for each stage: "
        "got 1 numbers for pp 2 x 1 stages. Correct the list, or leave it null.",
    ),
    (
        {"pp": 2, "stage_layers": [5, -1]},
        "parallel.stage_layers ([5, -1]) must give 0 layers or more to each stage: got -1 for "
        "stage 1. Correct the list, or leave it null.",
    ),
    ({"pp": 2, "stage_layers": []}, "got 0 numbers for pp 2 x 1 stages."),
    (
        {"pp": 2, "stage_layers": [2, 2], "schedule": INTERLEAVED},
        "got 2 numbers for pp 2 x 2 stages.",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_a_layout_that_contradicts_itself_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ParallelConfig(**values)


@pytest.mark.parametrize(
    ("values", "per_rank", "stages"),
    [
        ({}, 1, 1),
        ({"schedule": INTERLEAVED}, 1, 1),
        ({"pp": 4}, 1, 4),
        ({"pp": 4, "schedule": INTERLEAVED}, 2, 8),
        ({"pp": 4, "schedule": INTERLEAVED, "virtual_stages": 3}, 3, 12),
        ({"pp": 4, "schedule": ZERO_BUBBLE}, 1, 4),
        ({"pp": 4, "schedule": ZERO_BUBBLE, "virtual_stages": 2}, 2, 8),
    ],
)
def test_stages_of_a_schedule(values: dict[str, Any], per_rank: int, stages: int) -> None:
    config = ParallelConfig(**values)
    assert (config.stages_per_rank, config.num_stages) == (per_rank, stages)


@pytest.mark.parametrize(
    ("values", "num_processes", "message"),
    [
        (
            {"pp": 2, "tp": 2}, 6,
            "parallel.pp x parallel.tp (2 x 2) must divide the number of processes: got 6. Start a "
            "multiple of 4 (torchrun --nproc-per-node 4), or change parallel.pp or parallel.tp.",
        ),
        ({"tp": 4}, 2, "(1 x 4) must divide the number of processes: got 2. Start a multiple of 4"),
        (
            {"dp": 3, "tp": 2}, 8,
            "parallel.dp (3) must equal the number of processes: got 8 / (pp 1 x tp 2). Start 6 "
            "(torchrun --nproc-per-node 6), or set parallel.dp=4 or null.",
        ),
        ({"dp": 3}, 2, "parallel.dp (3) must equal the number of processes: got 2. Start 3 ("),
        (
            {"dp_replicate": 2, "dp_shard": 3, "pp": 2}, 8,
            "parallel.dp_replicate x parallel.dp_shard (2 x 3) must equal the number of processes: "
            "got 8 / (pp 2 x tp 1). Start 12 (torchrun --nproc-per-node 12), or leave parallel.dp "
            "and parallel.dp_shard null.",
        ),
        (
            {"dp_replicate": 3}, 4,
            "parallel.dp_replicate (3) must divide parallel.dp: got 4. Set it to 2 or 4, or change "
            "the number of processes.",
        ),
        ({"dp_replicate": 5}, 4, "parallel.dp_replicate (5) must divide parallel.dp: got 4. Set it "
                                 "to 4, or change the number of processes."),
        (
            {"ep": 4, "tp": 2}, 12,
            "parallel.ep (4) must divide parallel.dp, whose ranks share out the experts: got 6. "
            "Set it to 3 or 6, or change the number of processes.",
        ),
        ({"ep": 3, "shard": Shard.none}, 2, "parallel.ep (3) must divide parallel.dp, whose ranks "
                                            "share out the experts: got 2. Set it to 2, or"),
    ],
)  # fmt: skip
def test_a_layout_for_another_number_of_processes_is_refused(
    values: dict[str, Any], num_processes: int, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        axis_sizes(ParallelConfig(**values), num_processes)


@pytest.mark.parametrize(
    ("values", "sizes"),
    [
        ({}, (1, 1, 12, 1)),
        ({"shard": Shard.none}, (1, 12, 1, 1)),
        ({"dp_replicate": 3}, (1, 3, 4, 1)),
        ({"dp_shard": 3, "dp_replicate": 4}, (1, 4, 3, 1)),
        ({"pp": 3, "tp": 2}, (3, 1, 2, 2)),
        ({"pp": 3, "tp": 2, "shard": Shard.none, "dp": 2}, (3, 2, 1, 2)),
        ({"pp": 3, "dp_replicate": 2, "dp": 4, "dp_shard": 2}, (3, 2, 2, 1)),
        ({"tp": 2, "ep": 3}, (1, 1, 6, 2)),
    ],
)
def test_what_is_null_is_derived_from_the_processes(
    values: dict[str, Any], sizes: tuple[int, int, int, int]
) -> None:
    assert axis_sizes(ParallelConfig(**values), 12) == sizes


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": EngineName.deepspeed}, "engine (deepspeed) is not in this release."),
        ({"zero": 2}, "engine.zero (2) must be null for engine=torch. Use parallel.shard="),
    ],
)
def test_engines_of_later_releases_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        EngineConfig(**values)
