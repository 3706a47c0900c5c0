"""Predicted times against sums by hand, and against the figures that were published."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from models.cost import flops_per_token, mean_visible
from models.expert_config import ExpertConfig
from models.mixer_config import SinkConfig
from models.recomputation import NOTHING, Recomputation
from parallel.backend.cuda import table_flops
from parallel.backend.devices import Device, DeviceName, device_facts
from parallel.collective_bytes import step_traffic
from parallel.config import ParallelConfig, PipelineSchedule, Precision, Shard
from parallel.planned import Assignment, Job, Layout
from parallel.rank_memory import rank_memory
from parallel.roofline import EFFICIENCY, Efficiency, StepTime, _Clock, job_flops, step_time
from parallel.traffic import Kind, Traffic
from tests.models.test_cost import SPIKINGBRAIN_7B
from tests.parallel.planned_runs import job_of

PERFECT = Efficiency(
    products=1.0, softmax=1.0, linear=1.0, memory=1.0, links=1.0, overlap=1.0, latency_seconds=0.0
)
# Infinite bandwidths, so that FLOPs alone take time.
FAST = Device(
    name=DeviceName.h100, memory_bytes=2**40, memory_bandwidth=1e30, link_bandwidth=1e30,
    network_bandwidth=1e30, devices_per_node=8, kernels=("chunked", "blocked"),
    peak_flops=lambda _: 1e12, notes="",
)  # fmt: skip


def layout_of(dp_shard: int = 1, **parallel: Any) -> Layout:
    config = ParallelConfig(**parallel)
    return Layout(
        parallel=config, pp=config.pp, dp_replicate=config.dp_replicate, dp_shard=dp_shard,
        tp=config.tp,
    )  # fmt: skip


def time_of(
    job: Job, layout: Layout, device: Device = FAST, efficiency: Efficiency = PERFECT
) -> StepTime:
    given = Assignment.of(job, layout)
    ranks = range(layout.pp)
    memory = [rank_memory(given, rank) for rank in ranks]
    traffic = [step_traffic(given, rank) for rank in ranks]
    found = step_time(given, device, memory, traffic, efficiency)
    assert found is not None
    return found


def test_a_device_that_only_computes_takes_the_time_of_the_flops() -> None:
    job = job_of()
    tokens = job.rows * job.length
    visible = mean_visible([job.length]), mean_visible([job.length], 16)
    flops = flops_per_token(job.model, *visible)
    head = 2 * job.model.vocab_size * job.model.hidden_size
    found = time_of(job, layout_of())
    assert found.flops_per_token == flops
    # The loss computes its logits again.
    assert found.seconds == pytest.approx((flops + head) * tokens / 1e12)
    assert found.tokens_per_second == pytest.approx(tokens / found.seconds)
    assert found.mfu == pytest.approx(flops / (flops + head))
    assert (found.bubble, found.exposed) == (0.0, 0.0)


def test_whole_blocks_computed_again_cost_a_forward() -> None:
    blocks = frozenset({1, 3})
    plain, again = time_of(job_of(), layout_of()), None
    again = time_of(job_of(recompute=Recomputation(blocks=blocks)), layout_of())
    layers = job_flops(job_of()).layers
    extra = sum(layers[layer] for layer in blocks) / 3 * 8 * 64 / 1e12
    assert again.seconds - plain.seconds == pytest.approx(extra)


def test_a_pipeline_waits_and_more_ranks_share_the_work() -> None:
    one = time_of(job_of(), layout_of())
    two = time_of(job_of(), layout_of(pp=2))
    split = time_of(job_of(), layout_of(pp=2, schedule=PipelineSchedule.zero_bubble))
    assert two.bubble > 0
    assert two.seconds > one.seconds / 2
    assert split.bubble < two.bubble
    halves = time_of(job_of(), layout_of(tp=2))
    assert halves.seconds == pytest.approx(one.seconds / 2, rel=1e-6)


def test_every_other_operation_takes_the_time_of_its_bytes() -> None:
    slow_memory = replace(FAST, memory_bandwidth=1e9, peak_flops=lambda _: 1e30)
    found = time_of(job_of(), layout_of(), slow_memory)
    given = Assignment.of(job_of(), layout_of())
    (sizes,) = given.stage_bytes
    moved = sum(each.traffic for each in sizes.footprints)
    assert sizes.head is not None
    assert sizes.embedding is not None
    moved += sizes.head.traffic + sizes.embedding.traffic
    memory = rank_memory(given, 0)
    update = 2 * (memory.weights + memory.gradients + memory.optimizer)
    # Four microbatches, forward once and backward twice.
    assert found.seconds == pytest.approx((4 * 3 * moved + update) / 1e9)
    assert found.optimizer == pytest.approx(update / 1e9)


def test_collectives_hide_behind_computing_or_do_not() -> None:
    slow_links = replace(FAST, link_bandwidth=1e9)
    for shard, window in ((Shard.gradients, 1), (Shard.parameters, 4)):
        job, layout = job_of(), layout_of(dp_shard=2, shard=shard)
        job = replace(job, rows=16)
        given = Assignment.of(job, layout)
        moved = sum(each.sent(2) for each in step_traffic(given, 0)) / 1e9
        found = time_of(job, layout, slow_links)
        computing = time_of(job, layout).seconds
        hidden = computing * window / 4
        assert found.exposed == pytest.approx(max(0.0, moved - hidden))
        assert found.exposed > 0


def test_a_ring_is_as_fast_as_its_slowest_link() -> None:
    device = replace(FAST, link_bandwidth=2e9, network_bandwidth=1e9, devices_per_node=4)
    traffic = [Traffic("", Kind.send, "tp", 1, 10**9), Traffic("", Kind.send, "dp_shard", 2, 10**9)]
    given = Assignment.of(job_of(), layout_of(dp_shard=4, tp=2))
    clock = _Clock(given, device, replace(PERFECT, latency_seconds=0.25), 1e12, job_flops(job_of()))
    # tp stays within the node, dp reaches out of it; three calls.
    assert clock.seconds(traffic) == pytest.approx(0.5 + 1.0 + 3 * 0.25)


EXPERTS = ExpertConfig(num_experts=4, num_shared_experts=1, top_k=2, intermediate_size=64)


def time_of_experts(
    device: Device = FAST, again: Recomputation = NOTHING, num_sinks: int = 0, **moe: Any
) -> StepTime:
    sinks = SinkConfig(num_tokens=num_sinks)
    model = {"ffns": "d e d e", "moe": replace(EXPERTS, **moe), "sinks": sinks}
    return time_of(job_of(model=model, recompute=again), layout_of(), device)


def test_experts_take_the_time_of_their_flops_and_of_rows_that_only_fill_up() -> None:
    job = job_of(model={"ffns": "d e d e", "moe": EXPERTS})
    tokens, one_visit = job.rows * job.length, 6 * 64 * 64
    plain = time_of_experts()
    assert plain.flops_per_token == job_flops(job).total
    even = time_of_experts(capacity_factor=1.0)
    assert even.seconds == pytest.approx(plain.seconds)
    # Two layers, forward and twice backward, half of a token's two visits more.
    longer = time_of_experts(capacity_factor=1.5).seconds - plain.seconds
    assert longer == pytest.approx(2 * 3 * one_visit * tokens / 1e12)
    assert time_of_experts(capacity_factor=1.5).flops_per_token == plain.flops_per_token


def test_experts_that_run_again_take_their_forward_time() -> None:
    layers, tokens, one_visit = frozenset({1, 3}), 8 * 64, 6 * 64 * 64
    plain = time_of_experts().seconds
    # Two visits, and two of the shared expert's three products.
    experts = time_of_experts(again=Recomputation(experts=layers)).seconds - plain
    assert experts == pytest.approx(2 * (2 + 2 / 3) * one_visit * tokens / 1e12)
    whole = time_of_experts(again=Recomputation(expert_layers=layers)).seconds - plain
    assert whole == pytest.approx(2 * 3 * one_visit * tokens / 1e12)


def test_experts_are_read_however_few_rows_visit_them() -> None:
    device = replace(FAST, peak_flops=lambda _: 1e30, memory_bandwidth=1e9)
    sizes = {"intermediate_size": 4096, "num_shared_experts": 0}
    found = [time_of_experts(device, num_experts=n, **sizes).compute for n in (4, 8)]
    microbatches, layers, passes = 4, 2, 3
    read = 4 * 3 * 64 * 4096 * 4 / 1e9
    assert found[1] - found[0] == pytest.approx(microbatches * layers * passes * read, rel=0.01)


def test_experts_are_read_once_more_for_sinks() -> None:
    device = replace(FAST, peak_flops=lambda _: 1e30, memory_bandwidth=1e9)
    sizes = {"intermediate_size": 4096, "num_shared_experts": 0}
    found = [
        time_of_experts(device, num_sinks=count, num_experts=8, **sizes).compute for count in (0, 2)
    ]
    read = 8 * 3 * 64 * 4096 * 4 / 1e9
    assert found[1] - found[0] == pytest.approx(4 * 2 * 3 * read, rel=0.01)


def test_rows_of_experts_stay_within_their_part_of_dp() -> None:
    device = replace(FAST, link_bandwidth=2e9, network_bandwidth=1e9, devices_per_node=4)
    given = Assignment.of(job_of(), layout_of(dp_shard=8, dp_replicate=2, tp=2, ep=2))
    clock = _Clock(given, device, PERFECT, 1e12, job_flops(job_of()))

    def seconds(kind: Kind, axis: str) -> float:
        return clock.seconds([Traffic("", kind, axis, 1, 10**9)])

    # ep and tp share a node, the four shards of an expert and the two copies reach out of it.
    assert seconds(Kind.all_to_all, "ep") == pytest.approx(1 / 2 / 2)
    assert seconds(Kind.all_gather, "edp_shard") == pytest.approx(3 / 4)
    assert seconds(Kind.all_reduce, "edp_replicate") == pytest.approx(2 * 1 / 2)
    over_copies = Assignment.of(job_of(), layout_of(dp_shard=2, dp_replicate=4, ep=4)).layout
    assert (over_copies.edp_replicate, over_copies.edp_shard) == (2, 1)


def test_forward_passes_of_the_7b_take_what_the_report_measured() -> None:
    # SpikingBrain report, table 9: tokens a second, batch 1, forward only.
    published = {
        DeviceName.a100: {8192: 12621.84, 16384: 12768.80},
        DeviceName.c550: {8192: 11392.21, 16384: 11847.01},
    }
    for name, rates in published.items():
        device = device_facts(name)
        peak = device.peak_flops(torch.bfloat16)
        assert peak is not None
        for length, rate in rates.items():
            job = Job(
                model=SPIKINGBRAIN_7B, precision=Precision.bf16, length=length, rows=1,
                microbatch_rows=1, kernels=device.kernels,
            )  # fmt: skip
            given = Assignment.of(job, layout_of())
            clock = _Clock(given, device, EFFICIENCY, peak, job_flops(job))
            forward, _, _ = clock._computing(given.stage_bytes[0])
            assert length / forward == pytest.approx(rate, rel=0.05)


def test_branches_take_the_time_of_both_kernels() -> None:
    job = job_of(model={"mixers": "L+S F+L S _"})
    given, flops = Assignment.of(job, layout_of()), job_flops(job)

    def forward(efficiency: Efficiency) -> float:
        return _Clock(given, FAST, efficiency, 1e12, flops)._computing(given.stage_bytes[0])[0]

    tokens, perfect = given.work.tokens, forward(PERFECT)
    for kernel in ("softmax", "linear"):
        slower = forward(replace(PERFECT, **{kernel: 0.5})) - perfect
        assert slower == pytest.approx(tokens * sum(getattr(flops, kernel)) / 3 / 1e12, rel=1e-6)


def test_a_precision_without_a_peak_has_no_time() -> None:
    given = Assignment.of(job_of(precision=Precision.fp64), layout_of())
    memory, traffic = [rank_memory(given, 0)], [step_traffic(given, 0)]
    assert step_time(given, device_facts(DeviceName.c550), memory, traffic) is None


def test_devices_have_the_figures_of_their_back_ends() -> None:
    h100 = device_facts(DeviceName.h100)
    assert h100.peak_flops(torch.bfloat16) == table_flops("NVIDIA H100 80GB HBM3", torch.bfloat16)
    for name in DeviceName:
        device = device_facts(name)
        assert device.name is name
        assert device.peak_flops(torch.bfloat16)
        assert device.network_bandwidth <= device.link_bandwidth <= device.memory_bandwidth
        assert device.memory_bytes > 0
    assert "assumed" in device_facts(DeviceName.c550).notes
    assert device_facts(DeviceName.cpu).kernels == ("chunked", "blocked")
