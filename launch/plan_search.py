"""Which layouts of so many devices are fastest, and why the others cannot be: the auto-tuner.

Tries every split of the devices into pipeline, tensor and data parallelism with the schedules,
shard levels, recomputations and microbatches that go with it, and every cut of a model's experts; a
run's own checks refuse.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import product

from launch.plan_run import PlannedRun, plan_run
from models.layer_pattern import FfnKind
from parallel.backend.devices import Device
from parallel.config import ParallelConfig, PipelineSchedule, Recompute, Shard
from training.config import RunConfig, TrainingConfig
from training.ineffective import options_set

ALONE = tuple(
    (PipelineSchedule.one_f_one_b, shard) for shard in (Shard.gradients, Shard.parameters)
)
PIPELINED = tuple(
    (schedule, Shard.gradients)
    for schedule in (
        PipelineSchedule.one_f_one_b, PipelineSchedule.interleaved, PipelineSchedule.zero_bubble,
    )
)  # fmt: skip
"""Schedules and shard levels without and with a pipeline."""
RECOMPUTE = (Recompute.none, Recompute.selective, Recompute.full)
MICROBATCH_ROWS = (1, 2, 4, 8)
GIB = 2**30
_KEPT = ("vocab_multiple",)
"""What of `parallel` a search leaves as it is."""
_REPLACED = frozenset(
    [f"parallel.{each.name}" for each in fields(ParallelConfig) if each.name not in _KEPT]
    + ["training.recompute", "training.recompute_every", "training.recompute_modules"]
    + ["training.recompute_stages", "training.microbatch_rows"]
)


@dataclass(slots=True)
class Refusals:
    """How often layouts were refused for each reason, and the reason's first wording."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str) -> None:
        """Count a refusal; reasons that differ in numbers only are one."""
        key = re.sub(r"\d+", "N", reason)
        self.counts[key] += 1
        self.examples.setdefault(key, reason)

    def most_common(self) -> list[tuple[str, int]]:
        """Reasons in their first wording, the most frequent first."""
        return [(self.examples[key], count) for key, count in self.counts.most_common()]


@dataclass(frozen=True, slots=True)
class Found:
    """The fastest layouts that fit, and why others were refused."""

    best: list[PlannedRun]
    num_tried: int
    refused: list[tuple[str, int]]


def search(config: RunConfig, device: Device, num_devices: int, top: int) -> Found:
    """The `top` layouts on which the whole run, all its curriculum stages, takes least time.

    What a layout changes replaces the run's own (`replaced_keys`).
    """
    fitting: list[PlannedRun] = []
    refused = Refusals()
    tried = 0
    for parallel, recompute, rows in candidates(device, num_devices, _expert_parts(config)):
        tried += 1
        try:
            changed = _changed(config, parallel(), recompute, rows)
            planned = plan_run(changed, device, num_devices)
        except ValueError as error:
            refused.add(_first_sentence(error))
            continue
        if planned.fits:
            fitting.append(planned.timed())
        else:
            usable = planned.first.usable_bytes / GIB
            refused.add(f"needs more than the usable {usable:.0f} GiB of a device")
    fitting.sort(key=_by_speed)
    return Found(fitting[:top], tried, refused.most_common())


def candidates(
    device: Device, num_devices: int, expert_parts: Sequence[int] = (1,)
) -> Iterator[tuple[Callable[[], ParallelConfig], Recompute, int]]:
    """Layouts to try: how to make the parallel config, which may refuse, and the rest.

    Tensor parallelism stays within a node and comes with sequence parallelism. In a pipeline the
    shard level saves optimizer memory only, so that one is enough. Where the shards of parameters
    would reach over several nodes, copies of them that stay within one are tried too. Experts are
    cut into each of `expert_parts` that there are data-parallel ranks for.
    """
    for tp in _divisors(num_devices):
        for pp in _divisors(num_devices // tp) if tp <= device.devices_per_node else ():
            shards = max(1, device.devices_per_node // tp)
            dp = num_devices // (tp * pp)
            copies, rest = divmod(dp, shards)
            for dp_replicate, ep, (schedule, shard) in product(
                [1] if rest or copies < 2 else [1, copies],
                [parts for parts in expert_parts if parts <= dp],
                ALONE if pp == 1 else PIPELINED,
            ):
                make = partial(
                    ParallelConfig, pp=pp, tp=tp, ep=ep, sequence_parallel=tp > 1,
                    schedule=schedule, shard=shard, dp_replicate=dp_replicate,
                )  # fmt: skip
                for recompute, rows in product(RECOMPUTE, MICROBATCH_ROWS):
                    yield make, recompute, rows


def _expert_parts(config: RunConfig) -> list[int]:
    """Into how many equal parts the model's experts can be cut."""
    has_experts = FfnKind.mixture_of_experts in config.model.layers.ffns
    return _divisors(config.model.moe.num_experts) if has_experts else [1]


def replaced_keys(config: RunConfig) -> list[str]:
    """Keys that the run sets and that a search sets anew for each layout, with their values."""
    given = options_set("parallel", config.parallel) | options_set("training", config.training)
    return [f"{key} ({value})" for key, value in given.items() if key in _REPLACED]


def _changed(
    config: RunConfig, parallel: ParallelConfig, recompute: Recompute, rows: int
) -> RunConfig:
    default, kept = TrainingConfig(), {key: getattr(config.parallel, key) for key in _KEPT}
    training = replace(
        config.training,
        recompute=recompute,
        recompute_every=default.recompute_every,
        recompute_modules=default.recompute_modules,
        recompute_stages=None,
        microbatch_rows=rows,
    )
    return replace(config, parallel=replace(parallel, **kept), training=training)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _first_sentence(error: ValueError) -> str:
    """What cannot be, without what to do about it."""
    return str(error).split(". ")[0].rstrip(".")


def _by_speed(planned: PlannedRun) -> tuple[float, int]:
    return planned.seconds or 0.0, planned.peak_bytes
