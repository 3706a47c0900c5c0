"""In which order each pipeline rank works on its stages and microbatches, and what that wastes.

The orders are those of torch.distributed.pipelining (2.13), as lists: a planner can read them where
no process group exists. Knows neither bytes nor FLOPs; durations are arguments.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from parallel.config import ParallelConfig, PipelineSchedule


class Work(Enum):
    """What is done with a microbatch on a stage; a split backward has two halves."""

    forward = "F"
    backward = "B"
    backward_input = "I"
    backward_weight = "W"


@dataclass(frozen=True, slots=True)
class Action:
    """One piece of work."""

    work: Work
    stage: int
    microbatch: int


@dataclass(frozen=True, slots=True)
class Timeline:
    """How long a step takes from its first forward to its last backward, in units of durations."""

    makespan: float
    busy: tuple[float, ...]

    @property
    def bubble(self) -> float:
        """Share of all ranks' time in which they wait for one another."""
        return 1.0 - sum(self.busy) / (len(self.busy) * self.makespan)


def orders(parallel: ParallelConfig, num_microbatches: int) -> list[list[Action]]:
    """Actions of each pp rank, in order; of one rank alone, each microbatch to its end."""
    if parallel.pp == 1:
        kinds = (Work.forward, Work.backward)
        return [[Action(kind, 0, i) for i in range(num_microbatches) for kind in kinds]]
    of_rank = _SINGLE.get(parallel.schedule)
    if of_rank is not None:
        return [of_rank(rank, parallel.pp, num_microbatches) for rank in range(parallel.pp)]
    return [_interleaved(rank, parallel, num_microbatches) for rank in range(parallel.pp)]


def timeline(
    rank_orders: Sequence[Sequence[Action]], seconds: Callable[[Action], float]
) -> Timeline:
    """Run all ranks side by side: each action waits for its own rank and for its neighbours'.

    Sending takes no time here.
    """
    num_stages = 1 + max(action.stage for order in rank_orders for action in order)
    finished: dict[Action, float] = {}
    clocks = [0.0] * len(rank_orders)
    busy = [0.0] * len(rank_orders)
    places = [0] * len(rank_orders)
    while any(place < len(order) for place, order in zip(places, rank_orders, strict=True)):
        before = sum(places)
        for rank, order in enumerate(rank_orders):
            while places[rank] < len(order):
                action = order[places[rank]]
                needed = _needed(action, num_stages)
                if needed is not None and needed not in finished:
                    break
                start = max(clocks[rank], 0.0 if needed is None else finished[needed])
                duration = seconds(action)
                busy[rank] += duration
                clocks[rank] = finished[_result(action)] = start + duration
                places[rank] += 1
        assert sum(places) > before, "the order never ends"
    return Timeline(max(clocks), tuple(busy))


def _needed(action: Action, num_stages: int) -> Action | None:
    """Whose result an action on another rank waits for (as `_result` names it)."""
    if action.work is Work.forward and action.stage > 0:
        return Action(Work.forward, action.stage - 1, action.microbatch)
    is_gradient = action.work in (Work.backward, Work.backward_input)
    if is_gradient and action.stage < num_stages - 1:
        return Action(Work.backward, action.stage + 1, action.microbatch)
    return None


def _result(action: Action) -> Action:
    """The gradient of an input is there after a whole backward or after its first half."""
    if action.work is Work.backward_input:
        return Action(Work.backward, action.stage, action.microbatch)
    return action


def _gpipe(rank: int, pp: int, count: int) -> list[Action]:
    """All forwards, then all backwards."""
    return [Action(work, rank, i) for work in (Work.forward, Work.backward) for i in range(count)]


def _one_f_one_b(rank: int, pp: int, count: int) -> list[Action]:
    """As many forwards as there are stages from here on, then a backward for each forward."""
    warmup = min(count, pp - rank)
    actions = [Action(Work.forward, rank, i) for i in range(warmup)]
    for index in range(count):
        actions.append(Action(Work.backward, rank, index))
        if warmup + index < count:
            actions.append(Action(Work.forward, rank, warmup + index))
    return actions


def _interleaved(rank: int, parallel: ParallelConfig, count: int) -> list[Action]:
    """Rounds of microbatches through the rank's stages in turn; zero_bubble splits backwards.

    The weight halves of zero_bubble begin `rank` backwards late, where others would idle.
    """
    pp, per_rank = parallel.pp, parallel.stages_per_rank
    is_split = parallel.schedule is PipelineSchedule.zero_bubble
    in_round = count // max(1, count // pp)
    total = per_rank * count
    hops = (1 if is_split else 2) * (pp - 1 - rank)
    warmup = min((per_rank - 1) * in_round + hops, total)
    stage_turns = [(op // in_round) % per_rank for op in range(total)]
    forwards = [turn * pp + rank for turn in stage_turns]
    backwards = [(per_rank - 1 - turn) * pp + rank for turn in stage_turns]

    actions: list[Action] = []
    seen: Counter[tuple[Work, int]] = Counter()

    def act(work: Work, stage: int) -> None:
        actions.append(Action(work, stage, seen[work, stage]))
        seen[work, stage] += 1

    weights = 0
    for op in range(total + warmup):
        if op < total:
            act(Work.forward, forwards[op])
        if op >= warmup:
            act(Work.backward_input if is_split else Work.backward, backwards[op - warmup])
            if is_split and op - warmup >= rank:
                act(Work.backward_weight, backwards[weights])
                weights += 1
    for stage in backwards[weights:] if is_split else ():
        act(Work.backward_weight, stage)
    return actions


_SINGLE: dict[PipelineSchedule, Callable[[int, int, int], list[Action]]] = {
    PipelineSchedule.gpipe: _gpipe,
    PipelineSchedule.one_f_one_b: _one_f_one_b,
}
