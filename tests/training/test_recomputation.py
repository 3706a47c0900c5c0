"""From `training.recompute` and its companions to layers, and every refusal on the way."""

from __future__ import annotations

from typing import Any

import pytest

from models.recomputation import NOTHING, Recomputation
from parallel.config import ParallelConfig, PipelineSchedule, Recompute, RecomputeModule
from parallel.pipeline_cut import cut
from tests.models.tiny import tiny_config
from training.config import TrainingConfig
from training.recomputation import check_recomputation, recomputation

MODEL = tiny_config(mixers="L S L F _ L", ffns="d*6")
ALL = frozenset(range(6))
PP3 = ParallelConfig(pp=3, stage_layers=[2, 1, 3])
EMPTY_FIRST = ParallelConfig(pp=3, stage_layers=[0, 5, 1])


def config(recompute: str, *modules: str, **values: Any) -> TrainingConfig:
    if modules:
        values["recompute_modules"] = [RecomputeModule[name] for name in modules]
    return TrainingConfig(recompute=Recompute[recompute], **values)


def layers(*indices: int) -> frozenset[int]:
    return frozenset(indices)


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        (config("none"), NOTHING),
        (config("full"), Recomputation(blocks=ALL)),
        (config("every_n"), Recomputation(blocks=ALL)),
        (config("every_n", recompute_every=3), Recomputation(blocks=layers(0, 3))),
        (config("selective"), Recomputation(norms=ALL, activations=ALL)),
        (config("selective", "norms"), Recomputation(norms=ALL)),
        (config("selective", "activations"), Recomputation(activations=ALL)),
        (config("selective", "linear"), Recomputation(mixers=layers(0, 2, 5))),
        (config("selective", "sliding_window"), Recomputation(mixers=layers(1))),
        (
            config("selective", "full", "norms", "linear"),
            Recomputation(norms=ALL, mixers=layers(0, 2, 3, 5)),
        ),
        (config("full", recompute_stages=[0, 1]), Recomputation(blocks=layers(0, 1, 2))),
        (
            config("every_n", recompute_every=2, recompute_stages=[2]),
            Recomputation(blocks=layers(4)),
        ),
        (
            config("selective", "activations", "linear", recompute_stages=[2]),
            Recomputation(activations=layers(3, 4, 5), mixers=layers(5)),
        ),
    ],
)
def test_layers_of_a_config(training: TrainingConfig, expected: Recomputation) -> None:
    stages = cut(MODEL, PP3, sequence_length=16)
    check_recomputation(training, MODEL, PP3, stages)
    found = recomputation(training, MODEL, stages)
    assert found == expected
    found.check(MODEL)


@pytest.mark.parametrize(
    ("training", "parallel", "message"),
    [
        (
            config("full"),
            ParallelConfig(pp=3, schedule=PipelineSchedule.zero_bubble),
            r"training.recompute \(full\) must be none or selective for parallel.schedule zero_b",
        ),
        (
            config("every_n", recompute_every=2),
            ParallelConfig(pp=3, schedule=PipelineSchedule.zero_bubble),
            r"training.recompute \(every_n\) must be none or selective",
        ),
        (
            config("full", recompute_stages=[0, 3]),
            PP3,
            r"training.recompute_stages \(\[0, 3\]\) must be pipeline stages from 0 to 2",
        ),
        (
            config("full", recompute_stages=[-1]),
            PP3,
            r"training.recompute_stages \(\[-1\]\) must be pipeline stages from 0 to 2",
        ),
        (
            config("full", recompute_stages=[]),
            PP3,
            r"training.recompute_stages \(\[\]\) must hold a block to compute again: got none for "
            r"training.recompute=full",
        ),
        (
            config("every_n", recompute_every=4, recompute_stages=[1]),
            PP3,
            r"training.recompute_stages \(\[1\]\) must hold a block .* recompute_every 4",
        ),
        (
            config("selective", "norms", "sliding_window", recompute_stages=[1, 2]),
            PP3,
            r"training.recompute_stages \(\[1, 2\]\) must hold a layer with each of "
            r"training.recompute_modules: got none with sliding_window",
        ),
        (
            config("selective", recompute_stages=[0]),
            EMPTY_FIRST,
            r"training.recompute_stages \(\[0\]\) must hold a layer .* got none with norms",
        ),
    ],
)
def test_what_cannot_run_or_does_nothing_is_refused(
    training: TrainingConfig, parallel: ParallelConfig, message: str
) -> None:
    stages = cut(MODEL, parallel, sequence_length=16)
    with pytest.raises(ValueError, match=message):
        check_recomputation(training, MODEL, parallel, stages)


def test_a_mixer_that_the_model_does_not_have_is_refused_with_those_it_has() -> None:
    model = tiny_config(mixers="L S", ffns="d*2")
    stages = cut(model, ParallelConfig(), sequence_length=16)
    message = (
        r"training.recompute_modules \(full\) must be in the model: got model.mixers L S, "
        r"model.ffns d\*2. Choose from norms, activations, sliding_window, linear."
    )
    with pytest.raises(ValueError, match=message):
        check_recomputation(config("selective", "norms", "full"), model, ParallelConfig(), stages)


def test_experts_are_recomputed_where_they_are() -> None:
    model = tiny_config(mixers="L S L", ffns="d e e")
    stages = cut(model, ParallelConfig(), sequence_length=16)
    for name in ("experts", "expert_layers"):
        found = recomputation(config("selective", name), model, stages)
        assert found == Recomputation(**{name: layers(1, 2)})
        check_recomputation(config("selective", name), model, ParallelConfig(), stages)
    message = (
        r"training.recompute_modules \(experts\) must be in the model: got .* model.ffns d\*6. "
        "Choose from norms, activations, full, sliding_window, linear."
    )
    with pytest.raises(ValueError, match=message):
        check_recomputation(config("selective", "experts"), MODEL, ParallelConfig(), stages)


def test_experts_and_their_layers_are_one_too_many() -> None:
    model = tiny_config(mixers="L S L", ffns="d e e")
    stages = cut(model, ParallelConfig(), sequence_length=16)
    message = r"training.recompute_modules \(\['experts', 'expert_layers'\]\) must not have both"
    both = config("selective", "experts", "expert_layers")
    with pytest.raises(ValueError, match=message):
        check_recomputation(both, model, ParallelConfig(), stages)


def test_selective_recomputation_is_for_every_schedule() -> None:
    parallel = ParallelConfig(pp=3, schedule=PipelineSchedule.zero_bubble)
    stages = cut(MODEL, parallel, sequence_length=16)
    check_recomputation(config("selective", "norms", "linear"), MODEL, parallel, stages)
    alone = ParallelConfig(schedule=PipelineSchedule.zero_bubble)
    whole = cut(MODEL, alone, sequence_length=16)
    check_recomputation(config("full"), MODEL, alone, whole)


@pytest.mark.parametrize(
    ("recompute", "modules", "values", "message"),
    [
        (
            "selective", None, {"recompute_modules": []},
            r"training.recompute_modules \(\[\]\) must name something .* norms, activations, full",
        ),
        (
            "full", ("linear",), {},
            r"training.recompute_modules \(\['linear'\]\) must be left at its default without "
            "training.recompute=selective: got full",
        ),
        (
            "none", None, {"recompute_stages": [0]},
            r"training.recompute_stages \(\[0\]\) must be null without training.recompute",
        ),
        ("full", None, {"recompute_every": 2}, r"training.recompute_every \(2\) must be 1"),
        ("every_n", None, {"recompute_every": 0}, r"training.recompute_every \(0\) must be at le"),
    ],
)  # fmt: skip
def test_keys_that_contradict_each_other(
    recompute: str, modules: tuple[str, ...] | None, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config(recompute, *(modules or ()), **values)
