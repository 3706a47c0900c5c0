"""What tensor-parallel ranks tell each other in a step: borders of regions, thresholds, losses.

The borders are those of `parallel.regions`; each function here counts what the module that it is
named after asks for, forward, backward and when it runs again.
"""

from __future__ import annotations

from collections.abc import Iterator

from models.config import ThresholdGrad
from models.dispatch import num_expert_rows
from models.expert_config import Balance, ExpertConfig
from models.layer_pattern import FfnKind
from models.mixer_memory import has_head_norm, num_output_projections
from models.operation_memory import Again
from parallel.expert_bytes import COUNT_BYTES
from parallel.pipeline_cut import StageCut
from parallel.planned import Assignment
from parallel.traffic import Kind, Traffic


def tensor_parallel(given: Assignment, stage: StageCut) -> Iterator[Traffic]:
    """All of one stage."""
    job, count = given.job, given.num_microbatches
    if stage.has_embedding:
        yield from _left(given, 1, 0)
    for layer in range(stage.first_layer, stage.end_layer):
        again = job.again(layer)
        yield from _mixer(given, layer, again)
        if job.model.layers.ffns[layer] is FfnKind.mixture_of_experts:
            yield from _expert_layer(given, again)
        else:
            yield from _entered(given, 1, again.block or again.norms)
            # A block that runs again stops at its last operation that keeps something.
            yield from _left(given, 1, 0)
            yield from _thresholds(given, 1, again.block or again.activations)
    if stage.has_head:
        yield from _entered(given, 1, 0)
        numbers = given.work.tokens * job.master
        yield Traffic("losses", Kind.all_reduce, "tp", 2 * count, 3 * numbers * count)


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


def _expert_layer(given: Assignment, again: Again) -> Iterator[Traffic]:
    """Shared and routed experts; choices and weights, which the residual stream decides."""
    work, moe = given.work, given.job.model.moe
    is_layer_again, has_shared = again.block or again.expert_layer, moe.num_shared_experts > 0
    yield from _entered(given, 1, is_layer_again or again.norms)
    # Routed experts leave before the losses, if any, keep something.
    routed_again = again.expert_layer or (again.block and _has_losses(moe))
    yield from _left(given, 1 + has_shared, has_shared * is_layer_again + routed_again)
    inner_again = is_layer_again or again.experts or again.activations
    rows = num_expert_rows(moe, work.rows, work.length)
    yield from _thresholds(given, has_shared, has_shared * inner_again)
    yield from _thresholds(given, 1, inner_again, numbers=rows)
    choices = work.tokens * moe.top_k
    yield from _entered(given, 1, is_layer_again, size=choices * work.wide, purpose="weights")
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
) -> Iterator[Traffic]:
    """Into regions, in a microbatch; `again` of these in its backward pass too."""
    size, count = _whole(given) if size is None else size, given.num_microbatches
    forward, backward = (times + again) * count, times * count
    if given.work.sequence_parallel:
        yield Traffic(purpose, Kind.all_gather, "tp", forward, forward * size)
        yield Traffic(purpose, Kind.reduce_scatter, "tp", backward, backward * size)
    else:
        yield Traffic(purpose, Kind.all_reduce, "tp", backward, backward * size)


def _left(given: Assignment, times: int, again: int) -> Iterator[Traffic]:
    """Out of regions likewise."""
    size, count = _whole(given), given.num_microbatches
    forward, backward = (times + again) * count, times * count
    if given.work.sequence_parallel:
        yield Traffic("residual stream", Kind.reduce_scatter, "tp", forward, forward * size)
        yield Traffic("residual stream", Kind.all_gather, "tp", backward, backward * size)
    else:
        yield Traffic("residual stream", Kind.all_reduce, "tp", forward, forward * size)


def _thresholds(
    given: Assignment, times: int, again: int, *, numbers: int | None = None
) -> Iterator[Traffic]:
    """Of neurons whose channels are cut: as many numbers as tokens unless said otherwise."""
    job = given.job
    if job.is_spiking:
        is_trained = job.spiking.threshold_grad is ThresholdGrad.through
        calls = (times * (2 if is_trained else 1) + again) * given.num_microbatches
        size = calls * (given.work.tokens if numbers is None else numbers) * job.master
        yield Traffic("thresholds", Kind.all_reduce, "tp", calls, size)
