"""AdamW or SGD on this rank's plain shards, with its state as tensors and its counter as a number.

Works on views of the sharded parameters instead of DTensors: one fused call, and moments that lie
where their parameter lies. Knows neither gradients' communication nor files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from parallel.boxes import local_of
from parallel.engine_protocol import ParamGroup, UpdateRule

MOMENTS = ("exp_avg", "exp_avg_sq")


class LocalOptimizer:
    """The update of all groups. Moments exist from the start, so that a checkpoint can fill them.

    Args:
        parameters: this rank's parameters by name; those in no group must not require gradients.
        groups: names, weight decay and learning-rate factor; names that this rank does not have
            are another pipeline stage's.
        rule: AdamW or SGD and its constants.

    Raises:
        ValueError: one parameter in two groups.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        groups: Sequence[ParamGroup],
        rule: UpdateRule,
    ) -> None:
        trained = [name for group in groups for name in group.names if name in parameters]
        _check_once(trained)
        self._parameters = {name: parameters[name] for name in trained}
        self._shards = {name: local_of(parameters[name]) for name in trained}
        self._has_moments = rule.name.value == "adamw"
        # An empty shard (more ranks than rows) has nothing to update.
        arguments = [
            {
                "params": [
                    self._shards[name]
                    for name in group.names
                    if name in self._shards and self._shards[name].numel()
                ],
                "weight_decay": group.weight_decay,
                "lr_factor": group.lr_factor,
            }
            for group in groups
        ]
        self._optimizer = _build([a for a in arguments if a["params"]], rule)
        self._moments: dict[str, dict[str, Tensor]] = {}
        self._steps: list[Tensor] = []
        if self._has_moments:
            self._create_moments()

    @property
    def names(self) -> tuple[str, ...]:
        """Trained parameters, in the order of the groups."""
        return tuple(self._parameters)

    @property
    def num_updates(self) -> int:
        """Updates so far (AdamW's bias correction); goes into `manifest.json`."""
        return self._num_updates

    @num_updates.setter
    def num_updates(self, value: int) -> None:
        self._num_updates = value
        for step in self._steps:
            step.fill_(float(value))

    _num_updates: int = 0

    def update(self, gradients: Mapping[str, Tensor], lr: float) -> None:
        """Apply one update with this rank's shards of the gradients."""
        for name, shard in self._shards.items():
            # FSDP may move a shard into padded storage; the optimizer keeps the same tensor object.
            shard.data = local_of(self._parameters[name])
            shard.grad = gradients[name]
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        self._optimizer.step()
        self._num_updates += 1
        for shard in self._shards.values():
            shard.grad = None

    def state(self) -> Iterator[tuple[str, str, Tensor]]:
        """Each (moment, parameter, values), the values in memory shared with the optimizer."""
        for name, moments in self._moments.items():
            for moment, values in moments.items():
                yield moment, name, values

    def _create_moments(self) -> None:
        """Give each shard AdamW's state as torch would on its first step."""
        is_fused = bool(self._optimizer.defaults["fused"])
        for name, shard in self._shards.items():
            moments = {moment: torch.zeros_like(shard) for moment in MOMENTS}
            self._moments[name] = moments
            if not shard.numel():
                continue
            place = shard.device if is_fused else None
            step = torch.zeros((), dtype=torch.float32, device=place)
            self._steps.append(step)
            self._optimizer.state[shard] = {"step": step, **moments}


def _check_once(trained: Sequence[str]) -> None:
    if len(set(trained)) != len(trained):
        twice = next(name for name in trained if trained.count(name) > 1)
        raise ValueError(f"parameter groups must hold each parameter once: got {twice} twice.")


def _build(arguments: list[dict[str, Any]], rule: UpdateRule) -> torch.optim.Optimizer:
    """The torch optimizer, fused where the device has a fused kernel."""
    if not arguments:
        # This rank holds no row of any trained parameter.
        arguments = [{"params": [torch.zeros(0)], "weight_decay": 0.0, "lr_factor": 1.0}]
    if rule.name.value == "sgd":
        return torch.optim.SGD(arguments, lr=0.0)
    options: dict[str, Any] = {"lr": 0.0, "betas": (rule.beta1, rule.beta2), "eps": rule.eps}
    try:
        return torch.optim.AdamW(arguments, fused=True, **options)
    except RuntimeError:
        return torch.optim.AdamW(arguments, foreach=True, **options)
