"""Orders of work against torch's own schedules, and bubbles against the textbook."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.pipelining import PipelineStage

from parallel.config import ParallelConfig, PipelineSchedule
from parallel.pipeline import ONE_STAGE_A_RANK, SCHEDULES
from parallel.pipeline_cut import valid_microbatches
from parallel.schedule_order import Action, Work, orders, timeline
from tests.support.distributed import run_ranks

CASES = [
    (PipelineSchedule.gpipe, 1),
    (PipelineSchedule.one_f_one_b, 1),
    (PipelineSchedule.interleaved, 2),
    (PipelineSchedule.interleaved, 3),
    (PipelineSchedule.zero_bubble, 1),
    (PipelineSchedule.zero_bubble, 2),
]


class RecordedStage(PipelineStage):
    """Remembers what it was asked to do."""

    done: list[Action]

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        self.done.append(Action(Work.forward, self.stage_index, fwd_chunk_id))
        return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, **kwargs: Any
    ) -> None:
        work = Work.backward if full_backward else Work.backward_input
        self.done.append(Action(work, self.stage_index, bwd_chunk_id))
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, **kwargs)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, **kwargs: Any) -> None:
        self.done.append(Action(Work.backward_weight, self.stage_index, bwd_chunk_id))
        super().backward_weight_one_chunk(bwd_chunk_id, **kwargs)


def done_by_torch(layout: ParallelConfig, rank: int, count: int) -> list[Action]:
    """What torch's schedule really does on one rank."""
    stream = torch.zeros(1, 2, device="meta", requires_grad=True)
    done: list[Action] = []
    stages = []
    for index in range(rank, layout.num_stages, layout.pp):
        stage = RecordedStage(
            torch.nn.Linear(2, 2), index, layout.num_stages, torch.device("cpu"),
            input_args=(stream,), output_args=(stream,),
        )  # fmt: skip
        stage.done = done
        stages.append(stage)
    takes_one = layout.schedule in ONE_STAGE_A_RANK
    schedule = SCHEDULES[layout.schedule](
        stages[0] if takes_one else stages, count, loss_fn=lambda out, _: out.sum()
    )
    inputs = [torch.zeros(count, 2)] if rank == 0 else []
    target = torch.zeros(count) if stages[-1].is_last else None
    schedule.step(*inputs, target=target)
    return done


def recorded(rank: int, world_size: int) -> list[list[Action]]:
    return [done_by_torch(layout, rank, count) for layout, count in layouts_and_counts(world_size)]


def layouts_and_counts(pp: int) -> list[tuple[ParallelConfig, int]]:
    return [
        (ParallelConfig(pp=pp, schedule=schedule, virtual_stages=virtual), count)
        for schedule, virtual in CASES
        for count in (2, 3, 4, 5, 9)
        if valid_microbatches(schedule, count, pp, virtual)
    ]


@pytest.mark.parametrize("pp", [2, 3])
def test_orders_are_those_of_torch(pp: int, tmp_path: Path) -> None:
    results = run_ranks(recorded, pp, tmp_path=tmp_path)
    for index, (layout, count) in enumerate(layouts_and_counts(pp)):
        found = [result[index] for result in results]
        assert orders(layout, count) == found, (layout.schedule, layout.stages_per_rank, count)


def test_without_a_pipeline_each_microbatch_is_finished_before_the_next() -> None:
    (order,) = orders(ParallelConfig(), 2)
    assert "".join(f"{each.work.value}{each.microbatch}" for each in order) == "F0B0F1B1"
    assert timeline([order], lambda _: 1.0).bubble == 0.0


DURATIONS = {
    Work.forward: 1.0, Work.backward: 2.0, Work.backward_input: 1.0, Work.backward_weight: 1.0,
}  # fmt: skip


@pytest.mark.parametrize("schedule", [PipelineSchedule.gpipe, PipelineSchedule.one_f_one_b])
def test_the_bubble_is_that_of_the_textbook(schedule: PipelineSchedule) -> None:
    # GPipe and 1F1B waste (pp - 1) of (microbatches + pp - 1) slots.
    layout = ParallelConfig(pp=4, schedule=schedule)
    found = timeline(orders(layout, 12), lambda action: DURATIONS[action.work])
    assert found.makespan == (12 + 3) * 3
    assert found.busy == (36.0,) * 4
    assert found.bubble == pytest.approx(3 / 15)


def test_more_stages_and_split_backwards_shrink_the_bubble() -> None:
    def bubble(schedule: PipelineSchedule, virtual: int) -> float:
        layout = ParallelConfig(pp=4, schedule=schedule, virtual_stages=virtual)
        return timeline(orders(layout, 12), lambda each: DURATIONS[each.work] / virtual).bubble

    plain = bubble(PipelineSchedule.one_f_one_b, 1)
    # Narayanan et al., section 2.2: v stages a rank divide the bubble's time by v.
    assert bubble(PipelineSchedule.interleaved, 2) == pytest.approx(1.5 / 13.5)
    assert bubble(PipelineSchedule.zero_bubble, 1) < plain / 2


def test_an_uneven_stage_is_waited_for() -> None:
    layout = ParallelConfig(pp=2)
    found = timeline(orders(layout, 8), lambda each: DURATIONS[each.work] * (1 + each.stage))
    # Stage 1 works all the time but for the first forward of stage 0; its last gradient follows.
    assert found.makespan == 1 + 8 * 6 + 2
