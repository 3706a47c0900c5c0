"""Options that were asked for and change nothing in a run: each is a sentence to warn with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from fnmatch import fnmatchcase
from typing import Any

from models.config import ModelConfig
from models.expert_config import Balance
from models.layer_pattern import FfnKind, MixerKind
from models.mixer_config import GateKind, SinkInit
from parallel.config import ParallelConfig, PipelineSchedule, Shard
from training.config import DistillConfig, InitConfig, OptimizerConfig, OptimizerName, RunConfig

SINKS = "sinks.weight"
"""The parameter of sink tokens."""


def ineffective_options(config: RunConfig) -> list[str]:
    """One sentence for each."""
    return [
        *_of_layout(config.parallel),
        *_of_teacher(config.distill, has_teacher=config.training.teacher is not None),
        *_of_optimizer(config.optimizer),
        *_of_mixers(config.model),
        *_of_sinks(config.model, config.init),
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


def _of_mixers(model: ModelConfig) -> list[str]:
    lines, linear, where = [], model.linear, f"for model.mixers {model.mixers}"
    if all(len(mixers) < 2 for mixers in model.layers.mixers):
        lines += _changed("model.branches", model.branches, _names(model.branches), where)
    if not _has(model, MixerKind.linear):
        lines += _changed("model.linear", linear, _names(linear), where)
    elif linear.gate is GateKind.key_tied:
        names = ("gate_low_rank_dim", "gate_logit_normalizer")
        lines += _changed("model.linear", linear, names, "for model.linear.gate key_tied")
    return lines


def _of_sinks(model: ModelConfig, init: InitConfig) -> list[str]:
    lines, sinks, where = [], model.sinks, f"for model.mixers {model.mixers}"
    if not model.uses_sinks:
        return _changed("model.sinks", sinks, _names(sinks), "for model.sinks.num_tokens 0")
    if not _has(model, MixerKind.full, MixerKind.sliding_window):
        lines += _changed("model.sinks", sinks, ("rope",), where)
    if not _has(model, MixerKind.linear):
        lines += _changed("model.sinks", sinks, ("through_linear",), where)
    are_new = init.checkpoint is None or any(fnmatchcase(SINKS, each) for each in init.new)
    if sinks.init is SinkInit.bos and are_new:
        lines.append(
            "model.sinks.init (bos) has no effect on sinks that are not loaded, which are drawn: "
            "launch.convert copies the embedding."
        )
    return lines


def _has(model: ModelConfig, *kinds: MixerKind) -> bool:
    return any(kind in mixers for mixers in model.layers.mixers for kind in kinds)


def _of_experts(model: ModelConfig, parallel: ParallelConfig) -> list[str]:
    moe = model.moe
    if FfnKind.mixture_of_experts not in model.layers.ffns:
        where = f"for model.ffns {model.ffns}"
        return [
            *_changed("parallel", parallel, ("ep",), where),
            *_changed("model.moe", moe, _names(moe), where),
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
    return {
        f"{group}.{name}": str(_word(getattr(config, name)))
        for name in _names(config)
        if getattr(config, name) != getattr(default, name)
    }


def _names(config: Any) -> list[str]:
    return [each.name for each in fields(config)]


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
