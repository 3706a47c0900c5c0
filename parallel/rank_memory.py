"""What fills one rank's memory: exact bytes of what rests, and the peak of a step by replay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from models.dispatch import num_expert_rows
from models.layer_pattern import FfnKind
from parallel.memory_replay import StageBytes, replay
from parallel.planned import Assignment
from parallel.schedule_order import Action, Work
from parallel.unit_sizes import vocabulary_rows

INTEGER_BYTES = 8
COUNTER_BYTES = 4
"""AdamW's step, one a parameter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankMemory:
    """Bytes on the first rank of one pp coordinate; other dp and tp ranks hold as much or less.

    Exact: `weights`, `gradients` and `optimizer` at rest (FSDP2's padding included) and
    `parameters`, this rank's share of the model before sharding. `activations` are those of the
    microbatches in flight (`in_flight` of each stage) when they are most, `logits` and `neurons`
    the largest buffers of the loss and of a spiking neuron, `buffers` what batches, rotary tables
    and the pipeline's receive buffers take for a whole step. `peak` is the most that exists at
    once, gathered parameters and whole gradients included, so it is no sum of the others.
    """

    pp_rank: int
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    in_flight: dict[int, int]
    logits: int
    neurons: int
    buffers: int
    peak: int


def rank_memory(given: Assignment, pp_rank: int) -> RankMemory:
    """Memory of one pp coordinate."""
    job, order = given.job, given.orders[pp_rank]
    stages = [sizes for _, sizes in given.of_rank(pp_rank)]
    units = [unit for stage in stages for unit in stage.units]
    weights = sum(unit.all.shard for unit in units) * job.master
    optimizer = 0
    if job.has_moments:
        optimizer = sum(
            2 * unit.trained.own * job.master + unit.trained.count * COUNTER_BYTES for unit in units
        )
    buffers = _buffers(given, stages)
    in_flight, activations = _in_flight(stages, order)
    has_head = any(stage.head is not None for stage in stages)
    return RankMemory(
        pp_rank=pp_rank,
        parameters=sum(unit.all.whole for unit in units),
        weights=weights,
        gradients=sum(unit.trained.shard for unit in units) * job.master,
        optimizer=optimizer,
        activations=activations,
        in_flight=in_flight,
        logits=_logits(given) if has_head else 0,
        neurons=_neurons(given) if job.is_spiking else 0,
        buffers=buffers,
        peak=replay(stages, given.rules, order, resting=weights + optimizer + buffers),
    )


def _in_flight(stages: Sequence[StageBytes], order: Sequence[Action]) -> tuple[dict[int, int], int]:
    """Most microbatches of each stage between forward and backward, and the most that they keep."""
    kept = {
        stage.index: sum(each.kept for each in stage.footprints)
        + (stage.head.kept if stage.head is not None else 0)
        for stage in stages
    }
    now: Counter[int] = Counter()
    most: Counter[int] = Counter()
    peak = 0
    for action in order:
        if action.work is Work.forward:
            now[action.stage] += 1
        elif action.work is not Work.backward_input:
            now[action.stage] -= 1
        most |= now
        peak = max(peak, sum(count * kept[stage] for stage, count in now.items()))
    return dict(most), peak


def _buffers(given: Assignment, stages: Sequence[StageBytes]) -> int:
    """Batches, rotary tables, and a buffer for each microbatch that a pipeline receives."""
    job, layout, count = given.job, given.layout, given.num_microbatches
    tokens = count * job.microbatch_rows * job.length
    # Tokens, labels and document ids; positions of a microbatch, or of all in a pipeline.
    batch = INTEGER_BYTES * tokens * (4 if layout.pp > 1 else 3)
    tables = 2 * job.length * (job.model.head_dim // 2) * job.master
    received = 0
    if layout.pp > 1:
        for stage in stages:
            ends = (stage.embedding is not None) + (stage.head is not None)
            received += (2 - ends) * count * stage.stream
    return batch + tables + received


def _logits(given: Assignment) -> int:
    """One chunk in the dtype of its product and, where that is narrower, in the wide one."""
    job = given.job
    tokens = min(job.loss_chunk_tokens, job.microbatch_rows * job.length)
    rows = vocabulary_rows(job.model, given.shares)
    both = job.master + (job.narrow if job.narrow < job.master else 0)
    return tokens * rows * both


def _neurons(given: Assignment) -> int:
    """Counts in the wide dtype and the spiked value, of the widest site."""
    job, work = given.job, given.work
    model, moe = job.model, job.model.moe
    sites = [work.tokens * model.hidden_size]
    if FfnKind.dense in model.layers.ffns:
        sites.append(work.tokens * model.intermediate_size // work.tp)
    if FfnKind.mixture_of_experts in model.layers.ffns:
        inner = model.expert_intermediate_size // work.tp
        sites.append(work.tokens * moe.num_shared_experts * inner)
        sites.append(num_expert_rows(moe, work.rows, work.length) * inner)
    return max(sites) * (job.master + job.narrow)
