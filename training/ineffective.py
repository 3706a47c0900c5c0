"""Options that were asked for and change nothing in a run: each is a sentence to warn with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from models.config import ModelConfig
from models.expert_config import Balance
from models.layer_pattern import FfnKind
from parallel.config import ParallelConfig, PipelineSchedule, Shard
from training.config import DistillConfig, OptimizerConfig, OptimizerName, RunConfig


def ineffective_options(config: RunConfig) -> list[str]:
    """One sentence for each."""
    return [
        *_of_layout(config.parallel),
        *_of_teacher(config.distill, has_teacher=config.training.teacher is not None),
        *_of_optimizer(config.optimizer),
        *_of_experts(config.model, config.parallel),
    ]


def _of_layout(parallel: ParallelConfig) -> list[str]:
    lines = []
    if parallel.pp == 1:
        lines += _changed("parallel", parallel, ("schedule", "stage_layers"), "for parallel.pp 1")
    if parallel.tp == 1:
        lines += _changed("parallel", parallel, ("vocab_multiple",), "for parallel.tp 1")
    is_split = parallel.pp > 1 and parallel.schedule is PipelineSchedule.zero_bubble
    if is_split and parallel.shard is Shard.parameters:
        lines.append(
            "parallel.shard (parameters) acts as gradients for parallel.schedule zero_bubble: its "
            "split backward needs parameters that stay gathered."
        )
    return lines


def _of_teacher(distill: DistillConfig, *, has_teacher: bool) -> list[str]:
    if not has_teacher:
        return _changed("distill", distill, ("temperature", "offload"), "without training.teacher")
    if distill.kl == 0:
        return _changed("distill", distill, ("temperature",), "for distill.kl 0")
    return []


def _of_optimizer(optimizer: OptimizerConfig) -> list[str]:
    if optimizer.name is not OptimizerName.sgd:
        return []
    return _changed("optimizer", optimizer, ("beta1", "beta2", "eps"), "for optimizer.name sgd")


def _of_experts(model: ModelConfig, parallel: ParallelConfig) -> list[str]:
    moe = model.moe
    if FfnKind.mixture_of_experts not in model.layers.ffns:
        where = f"for model.ffns {model.ffns}"
        names = [each.name for each in fields(moe)]
        return [
            *_changed("parallel", parallel, ("ep",), where),
            *_changed("model.moe", moe, names, where),
        ]
    lines, where = [], f"for model.moe.balance {moe.balance.value}"
    if moe.balance in (Balance.none, Balance.bias):
        lines += _changed("model.moe", moe, ("balance_coefficient",), where)
    if moe.balance is not Balance.bias:
        lines += _changed("model.moe", moe, ("bias_update_rate",), where)
    return lines


def options_set(group: str, config: Any) -> dict[str, str]:
    """The options of a config node that are not at their defaults: key and value as in YAML."""
    default = type(config)()
    names = [each.name for each in fields(config)]
    return {
        f"{group}.{name}": str(_word(getattr(config, name)))
        for name in names
        if getattr(config, name) != getattr(default, name)
    }


def _changed(group: str, config: Any, names: Sequence[str], where: str) -> list[str]:
    """A sentence for each of `names` that is not at its default."""
    given = options_set(group, config)
    keys = [f"{group}.{name}" for name in names]
    return [f"{key} ({given[key]}) has no effect {where}." for key in keys if key in given]


def _word(value: Any) -> Any:
    """As it stands in YAML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(str(_word(each)) for each in value)}]"
    return getattr(value, "value", value)
