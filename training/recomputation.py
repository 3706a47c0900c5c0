"""From a run's config to what each layer computes again in the backward pass."""

from __future__ import annotations

from collections.abc import Sequence

from models.config import ModelConfig
from models.layer_pattern import FfnKind, MixerKind
from models.recomputation import NOTHING, Recomputation
from parallel.config import ParallelConfig, PipelineSchedule, Recompute, RecomputeModule
from parallel.pipeline_cut import StageCut
from training.config import TrainingConfig

_MIXERS = {
    RecomputeModule.full: MixerKind.full,
    RecomputeModule.sliding_window: MixerKind.sliding_window,
    RecomputeModule.linear: MixerKind.linear,
}
_EXPERTS = (RecomputeModule.experts, RecomputeModule.expert_layers)


def recomputation(
    training: TrainingConfig, model: ModelConfig, stages: Sequence[StageCut]
) -> Recomputation:
    """What `training.recompute` and its companions mean for the layers of `model`.

    Every n-th block counts through the whole model, whatever its stages.
    """
    layers = _layers(training, model, stages)
    if training.recompute is Recompute.none:
        return NOTHING
    if training.recompute is not Recompute.selective:
        every = training.recompute_every if training.recompute is Recompute.every_n else 1
        return Recomputation(blocks=frozenset(layer for layer in layers if layer % every == 0))
    found = {kind: _with_module(kind, layers, model) for kind in training.recompute_modules}
    return Recomputation(
        norms=found.get(RecomputeModule.norms, frozenset()),
        activations=found.get(RecomputeModule.activations, frozenset()),
        mixers=frozenset(i for kind in _MIXERS for i in found.get(kind, ())),
        experts=found.get(RecomputeModule.experts, frozenset()),
        expert_layers=found.get(RecomputeModule.expert_layers, frozenset()),
    )


def check_recomputation(
    training: TrainingConfig,
    model: ModelConfig,
    parallel: ParallelConfig,
    stages: Sequence[StageCut],
) -> None:
    """Refuse what the schedule cannot run, and what would do nothing.

    Raises:
        ValueError: naming the key, the value and what could be there.
    """
    whole_blocks = training.recompute in (Recompute.full, Recompute.every_n)
    is_split = parallel.pp > 1 and parallel.schedule is PipelineSchedule.zero_bubble
    if is_split and whole_blocks:
        raise ValueError(
            f"training.recompute ({training.recompute.value}) must be none or selective for "
            "parallel.schedule zero_bubble: its split backward would compute every block again for "
            "each of its parts. Set training.recompute=selective, or another parallel.schedule."
        )
    named = training.recompute_stages
    if named is not None and not set(named) <= set(range(len(stages))):
        raise ValueError(
            f"training.recompute_stages ({named}) must be pipeline stages from 0 to "
            f"{len(stages) - 1}: parallel.pp is {parallel.pp}. Correct the list, or leave it null."
        )
    if training.recompute is Recompute.selective:
        _check_modules(training, model, _layers(training, model, stages))
    elif (
        training.recompute is not Recompute.none
        and recomputation(training, model, stages) == NOTHING
    ):
        raise ValueError(
            f"training.recompute_stages ({named}) must hold a block to compute again: got none "
            f"for training.recompute={training.recompute.value}, recompute_every "
            f"{training.recompute_every}. Name other stages, or leave it null."
        )


def _check_modules(training: TrainingConfig, model: ModelConfig, layers: frozenset[int]) -> None:
    """Each module must be there, in the model and on the named stages; a layer or its experts."""
    if set(_EXPERTS) <= set(training.recompute_modules):
        raise ValueError(
            f"training.recompute_modules ({[m.value for m in training.recompute_modules]}) must "
            "not have both experts and expert_layers, which hold them. Remove one of the two."
        )
    everywhere = frozenset(range(model.num_hidden_layers))
    for module in training.recompute_modules:
        if not _with_module(module, everywhere, model):
            there = [
                kind.value for kind in RecomputeModule if _with_module(kind, everywhere, model)
            ]
            raise ValueError(
                f"training.recompute_modules ({module.value}) must be in the model: got "
                f"model.mixers {model.mixers}, model.ffns {model.ffns}. Choose from "
                f"{', '.join(there)}."
            )
        if not _with_module(module, layers, model):
            raise ValueError(
                f"training.recompute_stages ({training.recompute_stages}) must hold a layer with "
                f"each of training.recompute_modules: got none with {module.value}. Name other "
                "stages or modules, or leave it null."
            )


def _layers(
    training: TrainingConfig, model: ModelConfig, stages: Sequence[StageCut]
) -> frozenset[int]:
    """Layers of the named stages; without names all."""
    if training.recompute_stages is None:
        return frozenset(range(model.num_hidden_layers))
    named = [stages[index].part.layers for index in training.recompute_stages]
    return frozenset(layer for layers in named for layer in layers)


def _with_module(
    module: RecomputeModule, layers: frozenset[int], model: ModelConfig
) -> frozenset[int]:
    """Those of the layers that have what the module names."""
    mixers, ffns = model.layers.mixers, model.layers.ffns
    if module in _EXPERTS:
        return frozenset(i for i in layers if ffns[i] is FfnKind.mixture_of_experts)
    kind = _MIXERS.get(module)
    return layers if kind is None else frozenset(i for i in layers if kind in mixers[i])
