"""Parts of a model, one after the other, are the model: bit by bit, forward and backward."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from models.config import NeuronKind, SpikingConfig
from models.model import Model
from models.part import ModelPart
from models.spiking.neurons import Spikes
from models.spiking.recorder import SpikeRecorder
from tests.models.tiny import packed, random_tokens, tiny_config, tiny_model

SPIKING = SpikingConfig(neuron=NeuronKind.adaptive)
SEQUENCE = packed([[4, 3], [7]])
TOKENS, LABELS = random_tokens(2, 7), random_tokens(2, 7, seed=1)
CUTS = [[4], [1, 4], [2, 2, 4], [0, 3, 4], [1, 2, 3, 4], [3, 4, 4]]
"""Where each part ends; some parts have no layers, one of them alone the embedding or the head."""


def parts_of(model: Model, ends: list[int]) -> list[Model]:
    """Models of the stretches, with the whole model's values."""
    values = dict(model.named_parameters())
    last = len(ends) - 1
    parts = []
    for index, (first, end) in enumerate(pairwise([0, *ends])):
        stretch = ModelPart(first, end, has_embedding=index == 0, has_head=index == last)
        part = Model(model.config, spiking=SPIKING, part=stretch).double()
        for name, parameter in part.named_parameters():
            is_tied = name == "head.weight" and model.config.tie_word_embeddings
            parameter.data.copy_(values["embedding.weight" if is_tied else name])
        parts.append(part)
    return parts


def chained(parts: list[Model], spikes: Spikes | None, **options: Any) -> Tensor:
    x = TOKENS
    for part in parts[:-1]:
        x = part(x, SEQUENCE, spikes=spikes)
        assert x.shape == (2, 7, 24)
    return parts[-1](x, SEQUENCE, spikes=spikes, **options)


@pytest.mark.parametrize("ends", CUTS, ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_parts_in_a_row_are_the_whole_model(ends: list[int], tied: bool) -> None:
    model = tiny_model(tiny_config(tie_word_embeddings=tied), spiking=SPIKING)
    parts = parts_of(model, ends)
    records = [SpikeRecorder(1000), SpikeRecorder(1000)]
    for labels in (None, LABELS):
        expected = model(TOKENS, SEQUENCE, labels=labels, spikes=Spikes(3.0, recorder=records[0]))
        found = chained(parts, Spikes(3.0, recorder=records[1]), labels=labels)
        assert torch.equal(found, expected)
    assert records[0].summary() == records[1].summary()
    expected.backward()
    found.backward()
    gradients: dict[str, Tensor] = {}
    for part in parts:
        for name, parameter in part.named_parameters():
            assert parameter.grad is not None, name
            key = "embedding.weight" if tied and name == "head.weight" else name
            gradients[key] = gradients.get(key, 0) + parameter.grad
    whole = dict(model.named_parameters())
    assert gradients.keys() == whole.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, whole[name].grad), name


@pytest.mark.parametrize("ends", CUTS, ids=str)
def test_parts_in_a_row_lose_what_the_whole_model_does(ends: list[int]) -> None:
    model = tiny_model(spiking=SPIKING)
    spikes, x = Spikes(3.0), TOKENS
    for part in parts_of(model, ends):
        x = part.token_losses(x, SEQUENCE, LABELS, spikes=spikes)
    assert torch.equal(x, model.token_losses(TOKENS, SEQUENCE, LABELS, spikes=spikes))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ends", CUTS, ids=str)
def test_parts_hold_each_parameter_of_the_model_once(ends: list[int], tied: bool) -> None:
    """Under its name in the whole model; a tied head that lies apart has a copy of its own."""
    with torch.device("meta"):
        model = Model(tiny_config(tie_word_embeddings=tied))
        last = len(ends) - 1
        stretches = [
            ModelPart(first, end, has_embedding=index == 0, has_head=index == last)
            for index, (first, end) in enumerate(pairwise([0, *ends]))
        ]
        parts = [Model(model.config, part=stretch) for stretch in stretches]
    names = [name for part in parts for name, _ in part.named_parameters()]
    copies = ["head.weight"] if tied and len(ends) > 1 else []
    assert sorted(names) == sorted([name for name, _ in model.named_parameters()] + copies)
    shapes = {name: value.shape for name, value in model.named_parameters()}
    for part in parts:
        assert [block.layer for block in part.blocks] == list(part.part.layers)
        for name, parameter in part.named_parameters():
            assert parameter.shape == shapes.get(name, (61, 24)), name
        assert part.layouts() == model.layouts(), "the table is that of the whole model"


def test_the_whole_is_a_part() -> None:
    config = tiny_config()
    whole = ModelPart.whole(config)
    assert whole == ModelPart(0, 4, has_embedding=True, has_head=True)
    assert list(whole.layers) == [0, 1, 2, 3]
    assert tiny_model(config).part == whole


def test_a_part_without_head_has_no_logits() -> None:
    part = Model(tiny_config(), part=ModelPart(0, 2, has_embedding=True, has_head=False))
    with pytest.raises(AssertionError, match="this part of the model has no head"):
        part.apply_head(torch.zeros(1, 1, 24))
