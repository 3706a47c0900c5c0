"""Which layers lie on which pipeline stage, and how many microbatches a schedule can run.

Arithmetic over configs; builds no module and knows no process. Stages hold neighbouring layers; the
first one also the embedding, the last one also final norm, head and loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from models.config import ModelConfig
from models.cost import flops_by_part, mean_visible
from models.part import ModelPart
from parallel.config import ParallelConfig, PipelineSchedule

Value = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StageCut:
    """One stage: layers `first_layer` to below `end_layer`, on rank `pp_rank` of the pp axis.

    `cost` is its training FLOPs a token, head and loss included on the last stage.
    """

    index: int
    first_layer: int
    end_layer: int
    has_embedding: bool
    has_head: bool
    cost: float
    pp_rank: int

    @property
    def part(self) -> ModelPart:
        """The part of the model that the stage holds."""
        return ModelPart(self.first_layer, self.end_layer, self.has_embedding, self.has_head)


def cut(
    config: ModelConfig, parallel: ParallelConfig, *, sequence_length: int
) -> tuple[StageCut, ...]:
    """The stages of `config`, in order: as `parallel.stage_layers` says, or by cost.

    By cost, the largest stage is as cheap as it can be; among such cuts costs are as even as they
    can be (least sum of squares), then earlier stages smaller. A stage without layers is cut only
    where head and loss alone make the last stage expensive enough.

    Args:
        config: the model.
        parallel: the pp axis, its schedule and `stage_layers`.
        sequence_length: tokens of a row, which says how many keys attention sees.

    Raises:
        ValueError: more stages than layers, or `stage_layers` for another number of layers.
    """
    sizes = parallel.stage_layers
    num_layers, num_stages = config.num_hidden_layers, parallel.num_stages
    flops = flops_by_part(
        config,
        mean_visible([sequence_length]),
        mean_visible([sequence_length], config.visible_window_tokens),
    )
    if sizes is not None:
        _check_stage_layers(sizes, num_layers)
    else:
        _check_num_stages(parallel, num_layers)
        # Costs of a whole row are whole numbers, so ties are real ones.
        rows = [round(cost * sequence_length) for cost in flops.layers]
        sizes = even_sizes(rows, num_stages, last_extra=round(flops.head * sequence_length))
    ends = list(accumulate(sizes))
    return tuple(
        StageCut(
            index=index,
            first_layer=end - size,
            end_layer=end,
            has_embedding=index == 0,
            has_head=index == num_stages - 1,
            cost=sum(flops.layers[end - size : end])
            + (flops.embedding if index == 0 else 0.0)
            + (flops.head if index == num_stages - 1 else 0.0),
            pp_rank=index % parallel.pp,
        )
        for index, (size, end) in enumerate(zip(sizes, ends, strict=True))
    )


def even_sizes(costs: Sequence[int], num_stages: int, *, last_extra: int = 0) -> list[int]:
    """Layers of each stage so that the largest stage is cheapest, by dynamic programming.

    `last_extra` is added to the last stage, which alone may stay without layers. Ties: the least
    sum of squared stage costs, then the lexicographically smallest sizes.
    """
    before = [0, *accumulate(costs)]
    num_layers, last = len(costs), num_stages - 1

    def cost_of(first: int, end: int, stage: int) -> int:
        return before[end] - before[first] + (last_extra if stage == last else 0)

    def best(nothing: Value, joined: Callable[[int, int, Value], Value | None]) -> Value:
        """The least value of all cuts; `joined(cost, size, rest)` puts a stage before the rest."""
        of_rest = {num_layers: nothing}
        for stage in reversed(range(num_stages)):
            of_layers: dict[int, Value] = {}
            for first in range(num_layers + 1):
                ends = [num_layers] if stage == last else range(first + 1, num_layers + 1)
                values = [
                    joined(cost_of(first, end, stage), end - first, of_rest[end])
                    for end in ends
                    if end in of_rest
                ]
                allowed = [value for value in values if value is not None]
                if allowed:
                    of_layers[first] = min(allowed)
            of_rest = of_layers
        return of_rest[0]

    (limit,) = best((0,), lambda cost, size, rest: (max(cost, rest[0]),))
    _, *sizes = best(
        (0,),
        lambda cost, size, rest: None if cost > limit else (cost**2 + rest[0], size, *rest[1:]),
    )
    return sizes


def check_microbatches(
    schedule: PipelineSchedule, num_microbatches: int, pp: int, stages_per_rank: int
) -> None:
    """Refuse a number of microbatches that the schedule cannot run.

    Raises:
        ValueError: naming the nearest numbers that it can, and the keys to change.
    """
    if valid_microbatches(schedule, num_microbatches, pp, stages_per_rank):
        return
    valid = [
        count
        for count in range(1, 2 * max(num_microbatches, pp * stages_per_rank) + 1)
        if valid_microbatches(schedule, count, pp, stages_per_rank)
    ]
    below = [count for count in valid if count < num_microbatches][-1:]
    above = [count for count in valid if count > num_microbatches][:1]
    raise ValueError(
        f"The number of microbatches ({num_microbatches}) must {_RULES[schedule]} for "
        f"parallel.schedule {schedule.value}: got pp {pp} x {stages_per_rank} stages. The nearest "
        f"valid is {' or '.join(str(count) for count in below + above)}: change "
        "training.microbatch_rows, stages.<stage>.global_batch_tokens or parallel.dp."
    )


def valid_microbatches(
    schedule: PipelineSchedule, num_microbatches: int, pp: int, stages_per_rank: int
) -> bool:
    """Whether torch's schedule of that name runs this many microbatches of a step."""
    if num_microbatches < 1:
        return False
    if schedule is PipelineSchedule.gpipe:
        return True
    if schedule is PipelineSchedule.one_f_one_b:
        return num_microbatches >= pp * stages_per_rank
    num_rounds = max(1, num_microbatches // pp)
    return num_microbatches % num_rounds == 0


_RULES = {
    PipelineSchedule.gpipe: "be at least 1",
    PipelineSchedule.one_f_one_b: "be at least the number of stages",
    PipelineSchedule.interleaved: "be a multiple of its rounds, max(1, microbatches // pp),",
    PipelineSchedule.zero_bubble: "be a multiple of its rounds, max(1, microbatches // pp),",
}


def _check_num_stages(parallel: ParallelConfig, num_layers: int) -> None:
    if parallel.num_stages > num_layers:
        per_rank = parallel.stages_per_rank
        nearest = (
            f"parallel.pp={num_layers // per_rank}" if per_rank <= num_layers else "parallel.pp=1"
        )
        raise ValueError(
            f"parallel.pp ({parallel.pp}) must give at most one stage a layer: got pp "
            f"{parallel.pp} x {per_rank} stages for {num_layers} layers. The largest valid is "
            f"{nearest}."
        )


def _check_stage_layers(sizes: Sequence[int], num_layers: int) -> None:
    missing = num_layers - sum(sizes)
    if missing:
        nearest = [*sizes[:-1], sizes[-1] + missing] if sizes[-1] + missing >= 0 else None
        raise ValueError(
            f"parallel.stage_layers ({list(sizes)}) must sum to the layers of the model: got "
            f"{sum(sizes)} for {num_layers} layers. "
            + (f"Use {nearest}, or null." if nearest else "Correct the list, or use null.")
        )
