"""What the expert layers of a model chose in a step, over all ranks, and what follows from it.

Routers whose balance remembers something (`models.balance`) are moved here once a step, after the
update; every rank moves its own part by the same numbers.
"""

from __future__ import annotations

import torch

from models.balance import selection_bias_change
from models.config import ModelConfig
from models.layer_pattern import FfnKind
from models.routing import Routing, RoutingRecorder, StepRouting
from parallel import step_numbers
from parallel.rank_parameters import RankParameters


class RouterSteps:
    """Collects and moves; does nothing for a model without expert layers."""

    def __init__(self, config: ModelConfig, own: RankParameters) -> None:
        self._config, self._own = config, own
        self._has_experts = FfnKind.mixture_of_experts in config.layers.ffns
        self._recorder, self._num_tokens = RoutingRecorder(), 0
        self._step: StepRouting | None = None

    def begin(self, *, num_rows: int, num_tokens: int) -> Routing | None:
        """What a step of so many rows and tokens, on all ranks, tells expert layers."""
        self._step = None
        if not self._has_experts:
            return None
        self._recorder, self._num_tokens = RoutingRecorder(), num_tokens
        return Routing(num_rows, num_tokens, self._recorder)

    def collect(self) -> dict[str, float]:
        """Metrics of the step, on every rank. Collective."""
        if not self._has_experts:
            return {}
        mesh = self._own.mesh
        own = self._recorder.tensors(rank=mesh.rank, num_ranks=mesh.size)
        self._step = StepRouting.of(
            step_numbers.sum_by_name(mesh, own),
            self._config.moe,
            num_tokens=self._num_tokens,
        )
        return self._step.metrics()

    def loads(self) -> dict[str, float]:
        """`moe/<layer>/load_<expert>` of the step that was collected last."""
        return {} if self._step is None else self._step.load_metrics()

    @torch.no_grad()
    def move_states(self) -> None:
        """Let routers remember the step."""
        if self._step is None:
            return
        for name, layout in self._own.layouts.items():
            if layout.is_state and name in self._own.parameters:
                self._move(name, self._step)

    def _move(self, name: str, step: StepRouting) -> None:
        layer = int(name.split(".")[1])
        box = self._own.box(name)
        if name.endswith("previous_load"):
            box.fill(step.loads(layer))
            return
        change = selection_bias_change(step.counts[layer], self._config.moe.bias_update_rate)
        box.local.add_(change[box.slices].to(box.local))
