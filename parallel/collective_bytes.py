"""What one rank sends and receives in a step: each kind of collective, how often, how many bytes.

Counts the collectives of tensors; the few numbers that ranks gather every step are left out. The
size of a collective is that of its whole tensor: what an all-gather puts out, what a reduce-scatter
takes in, what is reduced or sent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from models.layer_pattern import FfnKind
from models.operation_memory import Again
from models.routing import SUMS
from parallel.config import Shard
from parallel.expert_bytes import COUNT_BYTES, Messages
from parallel.memory_replay import StageBytes
from parallel.pipeline_cut import StageCut
from parallel.planned import Assignment, sinks_are_read
from parallel.region_traffic import of_sinks, tensor_parallel
from parallel.schedule_order import Action, Work
from parallel.traffic import Kind, Traffic
from parallel.unit_sizes import own_rows, partial_elements, vocabulary_rows


def step_traffic(given: Assignment, pp_rank: int) -> list[Traffic]:
    """Everything that one rank of a pp coordinate communicates in a step, by purpose."""
    stages = given.of_rank(pp_rank)
    found: list[Traffic] = []
    for stage, sizes in stages:
        if given.layout.tp > 1:
            found += tensor_parallel(given, stage)
        if given.layout.ep > 1:
            found += _expert_parallel(given, stage)
        found += _data_parallel(given, sizes, given.orders[pp_rank])
        found += _pipeline(given, stage)
    cuts = [stage for stage, _ in stages]
    if given.layout.tp > 1:
        size = sum(_partial(given, stage) for stage in cuts) * given.job.master
        found.append(Traffic("partial gradients", Kind.all_reduce, "tp", 1, size))
    found += _tied(given, cuts)
    found += _routing(given)
    return _joined(found)


def _joined(parts: Sequence[Traffic]) -> list[Traffic]:
    """Add up what has the same purpose, kind and axis; nothing that never happens."""
    calls: Counter[tuple[str, Kind, str]] = Counter()
    sizes: Counter[tuple[str, Kind, str]] = Counter()
    for part in parts:
        key = (part.purpose, part.kind, part.axis)
        calls[key] += part.calls
        sizes[key] += part.size
    return [Traffic(*key, calls[key], sizes[key]) for key in calls if sizes[key]]


def _expert_parallel(given: Assignment, stage: StageCut) -> Iterator[Traffic]:
    """Rows of experts, there and home: as spikes where there are any, as if all were small."""
    model = given.job.model
    sinks = of_sinks(given) if model.uses_sinks else None
    for layer in range(stage.first_layer, stage.end_layer):
        if model.layers.ffns[layer] is FfnKind.mixture_of_experts:
            again = given.job.again(layer)
            yield _rows_of_experts(given, again, is_read=True)
            if sinks is not None:
                is_read = sinks_are_read(stage, layer)
                own = again.of_sinks(is_read=is_read)
                yield _rows_of_experts(sinks, own, is_read=is_read)


def _rows_of_experts(given: Assignment, again: Again, *, is_read: bool) -> Traffic:
    """Of one layer; nothing comes back for what nobody reads."""
    job, work, count = given.job, given.work, given.num_microbatches
    messages = Messages(
        moe=job.model.moe, hidden_size=job.model.hidden_size, rows=work.rows, length=work.length,
        ep=given.layout.ep, width=job.narrow, scale_width=job.master if job.is_spiking else None,
    )  # fmt: skip
    each = messages.crossing()
    forward = count * (1 + (again.block or again.experts or again.expert_layer))
    backward = count * is_read
    calls = forward * each.forward_calls + backward * each.backward_calls
    size = forward * each.forward_size + backward * each.backward_size
    return Traffic("rows of experts", Kind.all_to_all, "ep", calls, size)


def _routing(given: Assignment) -> Iterator[Traffic]:
    """What all tokens of the step chose: the sums of `models.routing` of every expert layer."""
    model, num_ranks = given.job.model, given.layout.num_devices
    num_layers = model.layers.ffns.count(FfnKind.mixture_of_experts)
    if num_layers and num_ranks > 1:
        numbers = num_layers * (model.moe.num_experts + len(SUMS) + num_ranks)
        yield Traffic("routing", Kind.all_reduce, "all", 1, numbers * COUNT_BYTES)


def _partial(given: Assignment, stage: StageCut) -> int:
    return partial_elements(
        given.job.model,
        stage,
        given.shares,
        sequence_parallel=given.work.sequence_parallel,
        frozen=given.job.frozen,
    )


def _data_parallel(
    given: Assignment, stage: StageBytes, order: Sequence[Action]
) -> Iterator[Traffic]:
    """FSDP2: parameters gathered, gradients reduced, over shards and over their copies."""
    job, layout = given.job, given.layout
    own = [action for action in order if action.stage == stage.index]
    count = sum(action.work is Work.forward for action in own)
    is_pipelined, shards = layout.pp > 1, layout.shard is Shard.parameters
    for unit in stage.units:
        gathers = _num_gathers(own, is_pipelined) if shards else 1
        if shards and (unit.layer is None or unit.is_float32):
            # The root and the small float32 units stay gathered from forward to backward.
            gathers = 1 if is_pipelined else count
        reductions = count if shards and not is_pipelined else 1
        width = job.master if unit.is_float32 else job.narrow
        axis = "edp" if unit.is_expert else "dp"
        if unit.num_shards > 1:
            size = unit.all.padded * width
            yield Traffic("parameters", Kind.all_gather, f"{axis}_shard", gathers, gathers * size)
            size = unit.trained.padded * job.master
            yield Traffic(
                "gradients", Kind.reduce_scatter, f"{axis}_shard", reductions, reductions * size
            )
        if unit.num_copies > 1:
            size = unit.trained.shard * job.master
            yield Traffic(
                "gradients", Kind.all_reduce, f"{axis}_replicate", reductions, reductions * size
            )


def _num_gathers(order: Sequence[Action], is_pipelined: bool) -> int:
    """How often a block's parameters are gathered when they are given up after each forward.

    Without a pipeline they are given up after each backward too; in one only the next forward ends
    with that.
    """
    gathers, is_gathered = 0, False
    for action in order:
        gathers += not is_gathered
        is_gathered = is_pipelined and action.work is not Work.forward
    return gathers


def _pipeline(given: Assignment, stage: StageCut) -> Iterator[Traffic]:
    """Activations to the next stage and gradients to the one before, for each microbatch."""
    count, streams = given.num_microbatches, [given.work.stream]
    if given.job.model.uses_sinks:
        streams.append(of_sinks(given).work.stream)
    ends = (stage.has_embedding, stage.has_head)
    for purpose, is_end in zip(("gradients of activations", "activations"), ends, strict=True):
        if not is_end and given.layout.pp > 1:
            yield Traffic(purpose, Kind.send, "pp", count * len(streams), count * sum(streams))


def _tied(given: Assignment, cuts: Sequence[StageCut]) -> Iterator[Traffic]:
    """The first and the last stage exchange their parts of a tied embedding's gradient."""
    model = given.job.model
    has_end = any(stage.has_embedding or stage.has_head for stage in cuts)
    is_trained = "embedding.weight" not in given.job.frozen
    if model.tie_word_embeddings and is_trained and given.layout.pp > 1 and has_end:
        rows = own_rows(vocabulary_rows(model, given.shares), given.shares)
        size = rows * model.hidden_size * given.job.master
        yield Traffic("tied gradient", Kind.send, "pp", 1, size)
