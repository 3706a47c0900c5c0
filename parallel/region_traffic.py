"""What tensor-parallel ranks tell each other in a step: borders of regions, thresholds, losses.

The borders are those of `parallel.regions`; each function here counts what the module that it is
named after asks for, forward, backward and when it runs again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from models.config import ThresholdGrad
from models.dispatch import num_expert_rows
from models.expert_config import Balance, ExpertConfig
from models.layer_pattern import FfnKind, Mixers
from models.mixer_memory import has_head_norm, num_output_projections
from models.operation_memory import Again
from parallel.expert_bytes import COUNT_BYTES
from parallel.pipeline_cut import StageCut
from parallel.planned import Assignment, sinks_are_read
from parallel.traffic import Kind, Traffic


def tensor_parallel(given: Assignment, stage: StageCut) -> Iterator[Traffic]:
    """All of one stage."""
    job, count = given.job, given.num_microbatches
    sinks = of_sinks(given) if job.model.uses_sinks else None
    if stage.has_embedding:
        yield from _left(given, 1, 0)
    for layer in range(stage.first_layer, stage.end_layer):
        again = job.again(layer)
        yield from _mixer(given, layer, again)
        # A block that runs again stops at its last operation that keeps something: of sinks, if
        # there are any.
        yield from _feed_forward(given, layer, again, ends_again=again.block and sinks is not None)
        if sinks is not None:
            is_read = sinks_are_read(stage, layer)
            yield from _mixer_of_sinks(sinks, job.model.sink_mixers[layer], again, is_read=is_read)
            own = again.of_sinks(is_read=is_read)
            yield from _feed_forward(sinks, layer, own, ends_again=False, is_read=is_read)
    if stage.has_head:
        yield from _entered(given, 1, 0)
        numbers = given.work.tokens * job.master
        yield Traffic("losses", Kind.all_reduce, "tp", 2 * count, 3 * numbers * count)


def of_sinks(given: Assignment) -> Assignment:
    """The stream of sinks of each microbatch as work of its own."""
    work = given.work.of_sinks()
    return replace(given, work=work, job=replace(given.job, model=work.model))


def _mixer(given: Assignment, layer: int, again: Again) -> Iterator[Traffic]:
    model = given.job.model
    mixers = model.layers.mixers[layer]
    if not mixers:
        return
    outputs = num_output_projections(model, mixers)
    yield from _entered(given, 1, again.block or again.norms)
    yield from _left(given, outputs, outputs * again.block)
    is_mixed_again = again.mixer or (has_head_norm(model, mixers) and again.norms)
    yield from _thresholds(given, outputs, outputs * (again.block or is_mixed_again))


def _mixer_of_sinks(
    given: Assignment, mixers: Mixers, again: Again, *, is_read: bool
) -> Iterator[Traffic]:
    """Sinks enter for their keys and states; parts of their own are not computed again."""
    if mixers:
        outputs = num_output_projections(given.job.model, mixers)
        yield from _entered(given, 1, again.block)
        yield from _left(given, outputs, outputs * again.block, is_read=is_read)
        yield from _thresholds(given, outputs, outputs * again.block, is_read=is_read)


def _feed_forward(
    given: Assignment, layer: int, again: Again, *, ends_again: bool, is_read: bool = True
) -> Iterator[Traffic]:
    """A dense or an expert layer; `ends_again`: its last border runs again with the block."""
    if given.job.model.layers.ffns[layer] is FfnKind.mixture_of_experts:
        yield from _expert_layer(given, again, ends_again=ends_again, is_read=is_read)
    else:
        yield from _entered(given, 1, again.block or again.norms, is_read=is_read)
        yield from _left(given, 1, ends_again, is_read=is_read)
        yield from _thresholds(given, 1, again.block or again.activations, is_read=is_read)


def _expert_layer(
    given: Assignment, again: Again, *, ends_again: bool, is_read: bool
) -> Iterator[Traffic]:
    """Shared and routed experts; choices and weights, which the residual stream decides."""
    work, moe = given.work, given.job.model.moe
    is_layer_again, has_shared = again.block or again.expert_layer, moe.num_shared_experts > 0
    yield from _entered(given, 1, is_layer_again or again.norms, is_read=is_read)
    # Routed experts leave before the losses, if any, keep something.
    routed_again = again.expert_layer or ends_again or (again.block and _has_losses(moe))
    leaving_again = has_shared * is_layer_again + routed_again
    yield from _left(given, 1 + has_shared, leaving_again, is_read=is_read)
    inner_again = is_layer_again or again.experts or again.activations
    rows = num_expert_rows(moe, work.rows, work.length)
    yield from _thresholds(given, has_shared, has_shared * inner_again, is_read=is_read)
    yield from _thresholds(given, 1, inner_again, numbers=rows, is_read=is_read)
    choices = work.tokens * moe.top_k
    size = choices * work.wide
    yield from _entered(given, 1, is_layer_again, size=size, purpose="weights", is_read=is_read)
    if work.sequence_parallel:
        forward = given.num_microbatches * (1 + is_layer_again)
        size = forward * choices * COUNT_BYTES
        yield Traffic("choices", Kind.all_gather, "tp", forward, size)
        if given.job.is_spiking and given.layout.ep > 1:
            size = forward * work.tokens * work.wide
            yield Traffic("thresholds", Kind.all_gather, "tp", forward, size)


def _has_losses(moe: ExpertConfig) -> bool:
    is_balanced = moe.balance not in (Balance.none, Balance.bias) and moe.balance_coefficient > 0
    return is_balanced or moe.z_loss_coefficient > 0


def _whole(given: Assignment) -> int:
    """All tokens of the residual stream."""
    return given.work.tokens * given.job.model.hidden_size * given.job.narrow


def _entered(
    given: Assignment,
    times: int,
    again: int,
    *,
    size: int | None = None,
    purpose: str = "residual stream",
    is_read: bool = True,
) -> Iterator[Traffic]:
    """Into regions, in a microbatch; `again` of these in its backward pass too.

    There is no gradient of what nobody reads (`is_read`).
    """
    size, count = _whole(given) if size is None else size, given.num_microbatches
    forward, backward = (times + again) * count, times * count * is_read
    if given.work.sequence_parallel:
        yield Traffic(purpose, Kind.all_gather, "tp", forward, forward * size)
        yield Traffic(purpose, Kind.reduce_scatter, "tp", backward, backward * size)
    else:
        yield Traffic(purpose, Kind.all_reduce, "tp", backward, backward * size)


def _left(given: Assignment, times: int, again: int, *, is_read: bool = True) -> Iterator[Traffic]:
    """Out of regions likewise."""
    size, count = _whole(given), given.num_microbatches
    forward, backward = (times + again) * count, times * count * is_read
    if given.work.sequence_parallel:
        yield Traffic("residual stream", Kind.reduce_scatter, "tp", forward, forward * size)
        yield Traffic("residual stream", Kind.all_gather, "tp", backward, backward * size)
    else:
        yield Traffic("residual stream", Kind.all_reduce, "tp", forward, forward * size)


def _thresholds(
    given: Assignment,
    times: int,
    again: int,
    *,
    numbers: int | None = None,
    is_read: bool = True,
) -> Iterator[Traffic]:
    """Of neurons whose channels are cut: as many numbers as tokens unless said otherwise."""
    job = given.job
    if job.is_spiking:
        is_trained = job.spiking.threshold_grad is ThresholdGrad.through
        calls = (times * (2 if is_trained and is_read else 1) + again) * given.num_microbatches
        size = calls * (given.work.tokens if numbers is None else numbers) * job.master
        yield Traffic("thresholds", Kind.all_reduce, "tp", calls, size)
