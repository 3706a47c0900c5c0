"""How long a step takes if everything runs at a stated share of what the device can do.

A roofline, not a measurement: matrix products at a share of peak FLOP/s, everything else at a share
of the memory bandwidth, collectives at a share of the links. The shares are here, in one table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from models.cost import FlopsPerToken, expert_flops_per_token, flops_by_part, mean_visible
from models.dispatch import num_expert_rows
from models.layer_pattern import FfnKind
from parallel.backend.devices import Device
from parallel.config import Shard
from parallel.fully_sharded import compute_dtype
from parallel.memory_replay import StageBytes
from parallel.pipeline_cut import StageCut
from parallel.planned import Assignment, Job
from parallel.rank_memory import RankMemory
from parallel.schedule_order import Action, Timeline, Work, timeline
from parallel.traffic import Kind, Traffic


@dataclass(frozen=True, kw_only=True, slots=True)
class Efficiency:
    """Shares of a device's figures that are reached in practice.

    `products`: of peak FLOP/s by large matrix products, `softmax` and `linear` by the attention
    kernels, forward and backward together; `memory`: of the memory bandwidth by element-wise
    operations; `links`: of a link's bandwidth by collectives of some megabytes. `overlap`: share of
    computing time behind which FSDP2's collectives can hide. `latency_seconds` is what every
    collective costs whatever its size.
    """

    products: float
    softmax: float
    linear: float
    memory: float
    links: float
    overlap: float
    latency_seconds: float


EFFICIENCY = Efficiency(
    # SpikingBrain report, table 9: the whole forward pass of the 7B at 8k reaches 60 % of peak on
    # A100 and on C550; its element-wise operations are counted apart here.
    products=0.68,
    # FlashAttention-2 paper: up to 73 % of peak on A100 forward, less backward and with windows.
    softmax=0.45,
    # FLA README: a GLA layer takes about as long as full attention at 4k tokens (GB200).
    linear=0.20,
    memory=0.80,
    links=0.70,
    overlap=0.80,
    latency_seconds=20e-6,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of a step and where they go; rates of all devices together.

    `compute` is that of the busiest rank, `bubble` the share of all ranks' time that they wait for
    one another, `exposed` the data-parallel communication that nothing hides.
    """

    seconds: float
    compute: float
    bubble: float
    exposed: float
    optimizer: float
    tokens_per_second: float
    flops_per_token: float
    mfu: float


def step_time(
    given: Assignment,
    device: Device,
    memory: Sequence[RankMemory],
    traffic: Sequence[Sequence[Traffic]],
    efficiency: Efficiency = EFFICIENCY,
) -> StepTime | None:
    """Predicted time of one step, or None where the device's peak in this precision is unknown.

    Args:
        given: a job on a layout.
        device: what every rank has.
        memory: `rank_memory` of every pp coordinate.
        traffic: `step_traffic` of every pp coordinate.
        efficiency: what is reached in practice.
    """
    job, layout = given.job, given.layout
    peak = device.peak_flops(compute_dtype(job.precision))
    if peak is None:
        return None
    clock = _Clock(given, device, efficiency, peak, job_flops(job))
    durations = {
        stage.index: clock.stage(stage, sizes, traffic[stage.pp_rank])
        for stage, sizes in zip(given.stages, given.stage_bytes, strict=True)
    }

    def seconds(action: Action) -> float:
        return durations[action.stage][action.work]

    line = timeline(given.orders, seconds)
    exposed = max(clock.exposed(each, durations, line) for each in traffic)
    update = max(each.optimizer + each.weights + each.gradients for each in memory)
    # Everything is read, weights and moments are written, gradients once more for their norm.
    optimizer = 2 * update / (device.memory_bandwidth * efficiency.memory)
    total = line.makespan + exposed + optimizer
    tokens = job.rows * job.length
    flops = clock.flops.total
    return StepTime(
        seconds=total,
        compute=max(line.busy),
        bubble=line.bubble,
        exposed=exposed,
        optimizer=optimizer,
        tokens_per_second=tokens / total,
        flops_per_token=flops,
        mfu=flops * tokens / total / (peak * layout.num_devices),
    )


def job_flops(job: Job) -> FlopsPerToken:
    """FLOPs a token of rows that are one document each."""
    return flops_by_part(
        job.model,
        mean_visible([job.length]),
        mean_visible([job.length], job.model.visible_window_tokens),
        microbatch_tokens=job.microbatch_rows * job.length,
    )


@dataclass(frozen=True, slots=True)
class _ExpertSeconds:
    """Of routed and shared experts, and what the routed ones take beyond their tokens' FLOPs."""

    routed: float
    shared: float
    added: float


@dataclass(frozen=True, slots=True)
class _Clock:
    """Turns FLOPs and bytes into seconds on one device."""

    given: Assignment
    device: Device
    efficiency: Efficiency
    peak: float
    flops: FlopsPerToken

    def stage(
        self, stage: StageCut, sizes: StageBytes, traffic: Sequence[Traffic]
    ) -> dict[Work, float]:
        """Seconds of each piece of work on one microbatch."""
        forward, again, products = self._computing(sizes)
        crossing = self._crossing(traffic)
        backward = 2 * forward + again + crossing
        # The half that adds up weight gradients is as long as the products of forward. The first
        # stage sends no gradient: torch leaves its whole backward to that half.
        weights = backward if stage.index == 0 else products
        return {
            Work.forward: forward + crossing,
            Work.backward: backward,
            Work.backward_input: backward - weights,
            Work.backward_weight: weights,
        }

    def exposed(
        self, traffic: Sequence[Traffic], durations: dict[int, dict[Work, float]], line: Timeline
    ) -> float:
        """Seconds of data-parallel communication that computing does not hide."""
        over_dp = [each for each in traffic if each.axis.startswith(("dp", "edp"))]
        gather = self.seconds([each for each in over_dp if each.kind is Kind.all_gather])
        reduce = self.seconds([each for each in over_dp if each.kind is not Kind.all_gather])
        shares_parameters = self.given.layout.shard is Shard.parameters
        if self.given.layout.pp > 1:
            # Whole gradients are reduced after the last backward.
            window = max(each[Work.forward] for each in durations.values())
            return max(0.0, gather - self.efficiency.overlap * window) + reduce
        of_one = durations[0][Work.forward] + durations[0][Work.backward]
        window = line.makespan if shares_parameters else of_one
        return max(0.0, gather + reduce - self.efficiency.overlap * window)

    def seconds(self, traffic: Sequence[Traffic]) -> float:
        """Of collectives one after the other."""
        total = 0.0
        for each in traffic:
            total += each.calls * self.efficiency.latency_seconds
            total += each.sent(self._num_ranks(each.axis)) / self._bandwidth(each.axis)
        return total

    def _computing(self, moved: StageBytes) -> tuple[float, float, float]:
        """Seconds of forward, of what runs again in backward, and of forward's products alone."""
        job, flops = self.given.job, self.flops
        tokens = self.given.work.tokens / self.given.layout.tp
        bandwidth = self.device.memory_bandwidth * self.efficiency.memory
        product_rate = self.peak * self.efficiency.products
        forward = again = products = 0.0
        for layer, footprint in zip(moved.layers, moved.footprints, strict=True):
            of_products = tokens * flops.products[layer] / 3 / product_rate
            experts = self._experts(layer)
            of_products += experts.added
            of_mixing = (
                tokens
                / 3
                / self.peak
                * (
                    flops.softmax[layer] / self.efficiency.softmax
                    + flops.linear[layer] / self.efficiency.linear
                )
            )
            of_bytes = footprint.traffic / bandwidth
            forward += of_products + of_mixing + of_bytes
            products += of_products
            named = job.again(layer)
            if named.block:
                again += of_products + of_mixing + of_bytes
            else:
                again += of_mixing * named.mixer
                parts = named.norms + named.activations + named.mixer
                parts += named.experts or named.expert_layer
                again += of_bytes / 3 * parts
                # Shared experts are not asked for what they put out.
                again += (experts.routed + experts.shared * 2 / 3) * named.experts
                again += (experts.routed + experts.shared) * named.expert_layer
        for end in (moved.embedding, moved.head):
            forward += 0.0 if end is None else end.traffic / bandwidth
        if moved.head is not None:
            of_head = tokens * flops.head / 3 / product_rate
            forward += of_head
            products += of_head
            # The loss computes its logits again.
            again += of_head
        return forward, again, products

    def _experts(self, layer: int) -> _ExpertSeconds:
        """Of one layer's forward pass; nothing for a dense one.

        Routed products take rows that only fill up too, and read every expert's matrices.
        """
        work, model = self.given.work, self.given.job.model
        if model.layers.ffns[layer] is not FfnKind.mixture_of_experts:
            return _ExpertSeconds(0.0, 0.0, 0.0)
        rate = self.peak * self.efficiency.products * work.tp / work.tokens
        routed, shared = (flops / rate for flops in expert_flops_per_token(model))
        rows = num_expert_rows(model.moe, work.rows, work.length)
        matrices = 3 * model.hidden_size * model.expert_intermediate_size * model.moe.num_experts
        reading = matrices / (work.ep * work.tp) * work.narrow
        reading /= self.device.memory_bandwidth * self.efficiency.memory
        taken = max(routed * rows / (work.tokens * model.moe.top_k), reading)
        # Sinks visit experts in a call of their own, few as they are.
        of_sinks = routed * model.sinks.num_tokens / work.tokens
        added = max(of_sinks, reading) - of_sinks if model.uses_sinks else 0.0
        return _ExpertSeconds(taken, shared, taken - routed + added)

    def _crossing(self, traffic: Sequence[Traffic]) -> float:
        """Seconds of a microbatch's borders of regions, rows of experts and sends, of one pass."""
        own = [each for each in traffic if each.axis in ("tp", "ep", "pp")]
        count = self.given.num_microbatches * self.given.layout.parallel.stages_per_rank
        return self.seconds(own) / count / 2

    def _num_ranks(self, axis: str) -> int:
        layout = self.given.layout
        sizes = {
            "tp": layout.tp, "dp_shard": layout.dp_shard, "dp_replicate": layout.dp_replicate,
            "pp": layout.pp, "ep": layout.ep, "all": layout.num_devices,
            "edp_shard": layout.edp_shard, "edp_replicate": layout.edp_replicate,
        }  # fmt: skip
        return sizes[axis]

    def _bandwidth(self, axis: str) -> float:
        """Of the slowest link that a ring along an axis uses; tp is innermost, pp outermost."""
        layout = self.given.layout
        reach = {
            "tp": layout.tp, "dp_shard": layout.tp * layout.dp_shard,
            "dp_replicate": layout.tp * layout.dp,
            "pp": layout.num_devices, "all": layout.num_devices,
            "ep": layout.tp * layout.ep, "edp_replicate": layout.tp * layout.dp,
            "edp_shard": layout.tp * layout.ep * layout.edp_shard,
        }[axis]  # fmt: skip
        inside = reach <= self.device.devices_per_node
        device = self.device
        return (device.link_bandwidth if inside else device.network_bandwidth) * (
            self.efficiency.links
        )
