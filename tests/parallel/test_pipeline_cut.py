"""Stages by cost against brute force, stages by hand, counts that torch's schedules take."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

from models import cost
from parallel.config import ParallelConfig, PipelineSchedule
from parallel.pipeline_cut import check_microbatches, cut, even_sizes, valid_microbatches
from tests.models.test_cost import SPIKINGBRAIN_7B
from tests.models.tiny import tiny_config


def all_sizes(num_layers: int, num_stages: int) -> Iterator[tuple[int, ...]]:
    """Every way to cut; only the last stage may stay without layers."""
    for sizes in product(range(num_layers + 1), repeat=num_stages):
        if sum(sizes) == num_layers and all(sizes[:-1]):
            yield sizes


def stage_costs(costs: list[int], sizes: tuple[int, ...], last_extra: int) -> list[int]:
    found, first = [], 0
    for size in sizes:
        found.append(sum(costs[first : first + size]))
        first += size
    found[-1] += last_extra
    return found


def test_the_cut_is_that_of_brute_force() -> None:
    generator = random.Random(5)
    for _ in range(300):
        num_layers = generator.randint(1, 8)
        num_stages = generator.randint(1, min(num_layers, 4))
        costs = [generator.choice([1, 2, 5, 12, 30]) for _ in range(num_layers)]
        last_extra = generator.choice([0, 3, 30])

        def order(sizes: tuple[int, ...]) -> tuple[Any, ...]:
            of_stages = stage_costs(costs, sizes, last_extra)  # noqa: B023
            return max(of_stages), sum(cost**2 for cost in of_stages), sizes

        best = min(all_sizes(num_layers, num_stages), key=order)
        assert tuple(even_sizes(costs, num_stages, last_extra=last_extra)) == best


def test_stages_of_the_7b() -> None:
    parallel = ParallelConfig(pp=4, schedule=PipelineSchedule.interleaved)
    stages = cut(SPIKINGBRAIN_7B, parallel, sequence_length=8192)
    assert [stage.index for stage in stages] == list(range(8))
    assert [stage.pp_rank for stage in stages] == [0, 1, 2, 3] * 2
    assert [stage.has_embedding for stage in stages] == [True] + [False] * 7
    assert [stage.has_head for stage in stages] == [False] * 7 + [True]
    ends = [0, *(stage.end_layer for stage in stages)]
    assert [stage.first_layer for stage in stages] == ends[:-1]
    assert ends[-1] == 28
    window = cost.mean_visible([8192], 4096)
    total = cost.flops_per_token(SPIKINGBRAIN_7B, cost.mean_visible([8192]), window)
    assert sum(stage.cost for stage in stages) == pytest.approx(total, rel=1e-12)
    # The head costs as much as 2.2 layers, so the last stage has fewer of them.
    assert [end - first for first, end in zip(ends, ends[1:], strict=False)] == [
        3,
        4,
        4,
        4,
        4,
        4,
        4,
        1,
    ]


def test_ties_leave_earlier_stages_smaller() -> None:
    assert even_sizes([1] * 5, 2) == [2, 3]
    assert even_sizes([1] * 4, 3) == [1, 1, 2]
    # The head decides the largest stage; the others are even all the same.
    assert even_sizes([1] * 12, 3, last_extra=10) == [6, 6, 0]
    assert even_sizes([1] * 12, 3, last_extra=4) == [5, 5, 2]


def test_stages_by_hand_may_be_empty() -> None:
    parallel = ParallelConfig(pp=3, stage_layers=[3, 0, 1])
    stages = cut(tiny_config(), parallel, sequence_length=16)
    assert [(stage.first_layer, stage.end_layer) for stage in stages] == [(0, 3), (3, 3), (3, 4)]
    assert stages[1].cost == 0
    assert cut(tiny_config(), ParallelConfig(), sequence_length=16)[0].end_layer == 4


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (
            ParallelConfig(pp=5),
            r"parallel\.pp \(5\) must give at most one stage a layer: got pp 5 x 1 stages for 4 "
            r"layers\. The largest valid is parallel\.pp=4\.",
        ),
        (
            ParallelConfig(pp=3, schedule=PipelineSchedule.interleaved),
            r"got pp 3 x 2 stages for 4 layers\. The largest valid is parallel\.pp=2\.",
        ),
        (
            ParallelConfig(pp=2, schedule=PipelineSchedule.interleaved, virtual_stages=5),
            r"got pp 2 x 5 stages for 4 layers\. The largest valid is parallel\.pp=1\.",
        ),
        (
            ParallelConfig(pp=2, stage_layers=[1, 2]),
            r"parallel\.stage_layers \(\[1, 2\]\) must sum to the layers of the model: got 3 for 4 "
            r"layers\. Use \[1, 3\], or null\.",
        ),
        (
            ParallelConfig(pp=2, stage_layers=[8, 1]),
            r"got 9 for 4 layers\. Correct the list, or use null\.",
        ),
    ],
)
def test_cuts_that_cannot_be(parallel: ParallelConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cut(tiny_config(), parallel, sequence_length=16)


def test_counts_are_those_that_torch_accepts() -> None:
    for pp in (2, 3, 4):
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=pp)
        try:
            for schedule, virtual in (
                (PipelineSchedule.gpipe, 1),
                (PipelineSchedule.one_f_one_b, 1),
                (PipelineSchedule.interleaved, 2),
                (PipelineSchedule.zero_bubble, 1),
                (PipelineSchedule.zero_bubble, 2),
            ):
                for count in range(1, 14):
                    expected = torch_takes(schedule, count, pp, virtual)
                    assert valid_microbatches(schedule, count, pp, virtual) == expected
        finally:
            dist.destroy_process_group()


def torch_takes(schedule: PipelineSchedule, count: int, pp: int, virtual: int) -> bool:
    row = torch.zeros(1)
    stages = [
        PipelineStage(
            torch.nn.Identity(), index, pp * virtual, torch.device("cpu"),
            input_args=(row,), output_args=(row,),
        )
        for index in range(0, pp * virtual, pp)
    ]  # fmt: skip
    single = {PipelineSchedule.gpipe: ScheduleGPipe, PipelineSchedule.one_f_one_b: Schedule1F1B}
    several = {
        PipelineSchedule.interleaved: ScheduleInterleaved1F1B,
        PipelineSchedule.zero_bubble: ScheduleInterleavedZeroBubble,
    }
    try:
        if schedule in single:
            single[schedule](stages[0], count)
        else:
            several[schedule](stages, count)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    ("schedule", "count", "pp", "virtual", "message"),
    [
        (
            PipelineSchedule.one_f_one_b, 3, 4, 1,
            r"The number of microbatches \(3\) must be at least the number of stages for "
            r"parallel\.schedule one_f_one_b: got pp 4 x 1 stages\. The nearest valid is 4: change "
            r"training\.microbatch_rows, stages\.<stage>\.global_batch_tokens or parallel\.dp\.",
        ),
        (PipelineSchedule.interleaved, 9, 4, 2, r"The nearest valid is 8 or 10: "),
        (PipelineSchedule.zero_bubble, 5, 2, 1, r"multiple of its rounds, .* valid is 4 or 6: "),
        (PipelineSchedule.gpipe, 0, 2, 1, r"must be at least 1 for .* valid is 1: "),
    ],
)  # fmt: skip
def test_counts_that_a_schedule_cannot_run(
    schedule: PipelineSchedule, count: int, pp: int, virtual: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_microbatches(schedule, count, pp, virtual)
    check_microbatches(schedule, 4, pp, virtual)
