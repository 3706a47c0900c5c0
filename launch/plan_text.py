"""A plan as text: tables of stages, memory, communication and time."""

from __future__ import annotations

from collections.abc import Iterator

from launch.plan_run import PlannedRun
from launch.plan_search import Found
from launch.plan_stage import PlannedStage
from models.config import NeuronKind
from models.cost import parameter_count
from parallel.backend.devices import Device
from parallel.config import Recompute
from parallel.roofline import EFFICIENCY
from parallel.traffic import Traffic
from training.config import RunConfig
from training.layout_table import Row, aligned, rank_table
from training.planned_job import left_out, planned_kernels

GIB = 2**30
MOST_REASONS = 8


def stage_lines(planned: PlannedStage) -> Iterator[str]:
    """Everything about one curriculum stage."""
    job, layout = planned.job, planned.layout
    count = layout.num_microbatches(job)
    yield (
        f"{planned.name}: {job.rows} rows x {job.length} tokens a step, microbatches a rank: "
        f"{count} of {_rows(job.microbatch_rows)}"
    )
    yield f"  {describe(planned)}"
    yield ""
    stages, ranks_each = planned.given.stages, layout.dp * layout.tp
    yield from _indented(rank_table(stages, planned.memory, ranks_each=ranks_each))
    verdict = "fits" if planned.fits else "does NOT fit"
    yield (
        f"  {verdict}: {planned.peak_bytes / GIB:.2f} GiB at the peak of the fullest rank, "
        f"{planned.usable_bytes / GIB:.1f} GiB usable of {planned.device.memory_bytes / GIB:.1f}"
    )
    if any(planned.traffic):
        yield ""
        yield from _indented(_communication(planned))
    yield ""
    yield from _indented(_time(planned))


def describe(planned: PlannedStage) -> str:
    """The layout in one line."""
    layout, job = planned.layout, planned.job
    words = []
    if layout.pp > 1:
        words.append(f"pp {layout.pp} ({layout.parallel.schedule.value})")
    is_copied = layout.dp_replicate > 1 and layout.dp_shard > 1
    dp = f"{layout.dp_replicate} x {layout.dp_shard} shards" if is_copied else f"{layout.dp}"
    words.append(f"dp {dp} ({layout.parallel.shard.value})")
    if layout.ep > 1:
        words[-1] += f" with ep {layout.ep}"
    if layout.tp > 1:
        sequence = " + sequence parallel" if layout.parallel.sequence_parallel else ""
        words.append(f"tp {layout.tp}{sequence}")
    return f"{' x '.join(words)}, {_rows(job.microbatch_rows)}, recompute {_recompute(planned)}"


def found_lines(found: Found) -> Iterator[str]:
    """The fastest layouts, and why others were refused."""
    yield f"{len(found.best)} fastest of {found.num_tried} layouts, each for the whole run"
    if found.best:
        yield from aligned([
            ("layout", "peak GiB", "hours", *_rate_headers(found.best[0])),
            *(_run_row(run) for run in found.best),
        ])  # fmt: skip
    if found.refused:
        yield f"  {sum(count for _, count in found.refused)} refused:"
    for reason, count in found.refused[:MOST_REASONS]:
        yield f"    {count:4d}  {reason}"
    rest = len(found.refused) - MOST_REASONS
    if rest > 0:
        yield f"          and {rest} more reasons"


def _rate_headers(run: PlannedRun) -> Iterator[str]:
    for stage in run.stages:
        yield f"{stage.name}: bubble"
        yield "tokens/s a device"
        yield "MFU"


def _run_row(run: PlannedRun) -> Row:
    hours = "unknown" if run.seconds is None else f"{run.seconds / 3600:,.1f}"
    rates: list[str] = []
    for stage in run.stages:
        time, devices = stage.time, stage.layout.num_devices
        if time is None:
            rates += ["unknown"] * 3
        else:
            rate = time.tokens_per_second / devices
            rates += [f"{time.bubble:.1%}", f"{rate:,.0f}", f"{time.mfu:.1%}"]
    return describe(run.first), f"{run.peak_bytes / GIB:.1f}", hours, *rates


def header_lines(config: RunConfig, device: Device, num_devices: int) -> Iterator[str]:
    """What is planned for which devices, and what the plan leaves out."""
    model, precision = config.model, config.training.precision
    is_spiking = config.spiking.neuron is not NeuronKind.off
    yield (
        f"{model.layers.describe()} | {parameter_count(model):,} parameters | "
        f"{precision.value}{' | spiking' if is_spiking else ''}"
    )
    yield (
        f"{num_devices} x {device.name.value}: "
        f"{device.memory_bytes / GIB:.0f} GiB, {device.memory_bandwidth / 1e9:,.0f} GB/s, links "
        f"{device.link_bandwidth / 1e9:,.0f} and {device.network_bandwidth / 1e9:,.0f} GB/s, "
        f"{device.devices_per_node} a node, kernels "
        f"{' and '.join(planned_kernels(device.kernels, precision))}"
    )
    yield f"  {device.notes}"
    share = EFFICIENCY
    yield (
        f"  efficiencies assumed: products {share.products:.0%}, softmax {share.softmax:.0%} and "
        f"linear attention {share.linear:.0%} of peak FLOP/s, memory {share.memory:.0%}, links "
        f"{share.links:.0%}"
    )
    yield (
        "  counted: training steps on rows of one document each, without evaluation and the host's "
        "copy of an asynchronous checkpoint"
    )
    for line in left_out(config):
        yield f"  {line}"


def _communication(planned: PlannedStage) -> Iterator[str]:
    """Of the rank that moves most."""
    traffic = max(planned.traffic, key=lambda each: sum(part.size for part in each))
    yield "communication of a rank in a step (whole tensors; the rank that moves most)"
    rows: list[Row] = [("of", "collective", "axis", "calls", "GiB")]
    rows += [_traffic_row(each) for each in traffic]
    yield from aligned(rows)


def _traffic_row(each: Traffic) -> Row:
    size = f"{each.size / GIB:,.3f}"
    return each.purpose, each.kind.value, each.axis, f"{each.calls:,}", size


def _time(planned: PlannedStage) -> Iterator[str]:
    time = planned.time
    if time is None:
        yield (
            f"time: unknown, {planned.device.name.value} has no known peak FLOP/s in "
            f"{planned.job.precision.value}"
        )
        return
    yield f"FLOPs a token: {time.flops_per_token / 1e9:,.2f} G (forward and backward, once)"
    yield (
        f"step: {time.seconds:.3f} s = {time.compute:.3f} busiest rank + waiting (bubble "
        f"{time.bubble:.1%}) + {time.exposed:.3f} data-parallel communication not hidden + "
        f"{time.optimizer:.3f} update"
    )
    rate, devices = time.tokens_per_second, planned.layout.num_devices
    yield (
        f"predicted: {rate:,.0f} tokens/s, {rate / devices:,.0f} a device, MFU {time.mfu:.1%} "
        "(roofline at the efficiencies above)"
    )


def _recompute(planned: PlannedStage) -> str:
    named = planned.job.recompute
    parts = {
        "norms": named.norms, "activations": named.activations, "mixers": named.mixers,
        "experts": named.experts, "expert layers": named.expert_layers,
    }  # fmt: skip
    inside = [name for name, layers in parts.items() if layers]
    if inside:
        return f"{Recompute.selective.value} ({', '.join(inside)})"
    if not named.blocks:
        return Recompute.none.value
    total = planned.job.model.num_hidden_layers
    return Recompute.full.value if len(named.blocks) == total else f"{len(named.blocks)} blocks"


def _rows(count: int) -> str:
    return f"{count} row{'s' if count > 1 else ''}"


def _indented(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        yield f"  {line}"
