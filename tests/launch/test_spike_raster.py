"""The raster file holds the counts that the model's neuron really fires."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launch.report_inputs import read_inputs
from launch.spike_raster import Sentence, write_raster
from models.config import ModelConfig, NeuronKind, SpikingConfig
from models.initialisation import initialise
from models.model import Model

WORDS = ["zero", " one", "\ntwo", "three"]


def build(neuron: NeuronKind) -> Model:
    config = ModelConfig(
        vocab_size=4, hidden_size=16, intermediate_size=24, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, mixers="F F", ffns="d d",
    )  # fmt: skip
    model = Model(config, spiking=SpikingConfig(neuron=neuron)).double()
    initialise(model, seed=3)
    return model


def sentence(ids: list[int]) -> Sentence:
    return Sentence(ids, lambda ids: "".join(WORDS[i] for i in ids))


def test_counts_are_those_of_the_equation(tmp_path: Path) -> None:
    model = build(NeuronKind.adaptive)
    path = write_raster(model, sentence([2, 0, 3]), tmp_path, k=3.0, site="0/mixer_in")
    assert path == tmp_path / "spike_raster.npz"
    raster = read_inputs(tmp_path, {}).raster
    assert raster is not None
    assert raster.tokens == ("\ntwo", "zero", "three")
    assert raster.site == "0/mixer_in"
    x = model.embedding.weight[[2, 0, 3]].detach()
    x = x / (x.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()
    expected = torch.round(x / (x.abs().mean(-1, keepdim=True) / 3.0))
    assert raster.counts.tolist() == expected.to(torch.int64).tolist()


def test_default_site_is_in_the_middle(tmp_path: Path) -> None:
    write_raster(build(NeuronKind.adaptive), sentence([1]), tmp_path, k=3.0)
    raster = read_inputs(tmp_path, {}).raster
    assert raster is not None
    assert raster.site == "1/ffn_in"
    assert raster.counts.shape == (1, 16)


def test_refuses_no_text_and_no_spikes(tmp_path: Path) -> None:
    model = build(NeuronKind.off)
    with pytest.raises(ValueError, match=r"sentence \(no tokens\) must have at least one token"):
        write_raster(model, sentence([]), tmp_path, k=3.0)
    with pytest.raises(
        ValueError, match=r"site \(1/ffn_in\) must be a place where the model spikes"
    ):
        write_raster(model, sentence([1]), tmp_path, k=3.0)
