"""Routed experts cut over the expert-parallel ranks: each holds an equal part of every layer's.

Rows travel to the ranks of their experts and their outputs come home (`parallel.row_routes`);
between, this rank's experts compute as those of one process. A rank's experts see rows of all ranks
of the group, so that gradients are left to be summed over the ranks that hold the same experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from models.config import ModelConfig
from models.experts import Experts
from models.grouped_linear import Groups
from models.layer_pattern import FfnKind
from models.layers import LocalLayers
from models.spiking.neurons import Spikes
from parallel.row_routes import Integers, Route, find_route, from_experts, to_experts


class DistantExperts(Experts):
    """This rank's part of `num_experts`, behind the way to them; arguments as of `Experts`."""

    sends_spikes = True

    def __init__(  # noqa: PLR0913 - those of Experts, and the group
        self,
        num_experts: int,
        hidden_size: int,
        inner_size: int,
        *,
        group: dist.ProcessGroup,
        neuron: nn.Module | None,
        layer: int,
        activations_again: bool,
    ) -> None:
        assert num_experts % group.size() == 0, "check_expert_parallel has refused this"
        super().__init__(
            num_experts // group.size(),
            hidden_size,
            inner_size,
            neuron=neuron,
            layer=layer,
            activations_again=activations_again,
        )
        self._group = group

    def forward(self, x: Tensor, groups: Groups, spikes: Spikes | None = None) -> Tensor:
        """Map this rank's rows `[M, D]` for all experts to `[M, D]`. Collective."""
        if isinstance(self, FSDPModule):
            # Computed again in the backward pass, it is called without FSDP's hooks.
            self.unshard()
        integers = None if groups.scale is None else Integers.of(x.detach(), groups.scale)
        route, are_exact = find_route(groups, self._group, integers)
        rows = to_experts(x, route, integers if are_exact else None)
        arrived, spikes = _arrived(groups, route, spikes)
        return from_experts(super().forward(rows, arrived, spikes), route)


class ExpertParallelLayers(LocalLayers):
    """Whole layers but for experts, which are cut over `group`."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._build_experts = expert_builder(group)

    def experts(
        self,
        num_experts: int,
        hidden_size: int,
        inner_size: int,
        *,
        neuron: nn.Module | None,
        layer: int,
        activations_again: bool,
    ) -> nn.Module:
        """This rank's part of the experts."""
        return self._build_experts(
            num_experts,
            hidden_size,
            inner_size,
            neuron=neuron,
            layer=layer,
            activations_again=activations_again,
        )


def expert_builder(group: dist.ProcessGroup | None) -> Callable[..., nn.Module]:
    """What makes a layer's experts: all of them, or this rank's part."""
    return Experts if group is None else partial(DistantExperts, group=group)


def check_expert_parallel(config: ModelConfig, ep: int) -> None:
    """Refuse an ep that does not divide the experts.

    Raises:
        ValueError: naming both numbers and the nearest valid ones.
    """
    count = config.moe.num_experts
    if FfnKind.mixture_of_experts not in config.layers.ffns or count % ep == 0:
        return
    divisors = [size for size in range(1, count + 1) if count % size == 0]
    near = [max(size for size in divisors if size < ep)]
    near += [size for size in divisors if size > ep][:1]
    raise ValueError(
        f"parallel.ep ({ep}) must divide model.moe.num_experts: got {count}. Set it to "
        f"{' or '.join(map(str, near))}, or change model.moe.num_experts."
    )


def _arrived(groups: Groups, route: Route, spikes: Spikes | None) -> tuple[Groups, Spikes | None]:
    """The rows of this rank's experts, and how they spike.

    Statistics are of the rows that their senders would sample if they had all experts.
    """
    length = None if groups.length is None else groups.length * len(route.sent)
    if spikes is None or spikes.recorder is None:
        return Groups(route.counts, length=length), spikes
    is_sampled = torch.zeros(sum(route.sent), dtype=torch.int8, device=route.order.device)
    rows = torch.arange(sum(route.sent), device=route.order.device)
    rows = rows if groups.is_real is None else rows[groups.is_real]
    is_sampled[rows[spikes.recorder.sampled(len(rows))]] = 1
    arrived = Groups(route.counts, length=length, is_real=route.there(is_sampled).bool())
    return arrived, replace(spikes, recorder=spikes.recorder.of_all())
