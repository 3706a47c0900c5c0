from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from models.config import ModelConfig, NeuronKind, SpikingConfig
from models.conversion.config_keys import Format
from models.conversion.convert import plan_conversion
from models.conversion.own_format import read_spikes
from models.conversion.source_config import read_config
from models.conversion.target_config import write_config
from models.conversion.weight_map import ours, theirs
from models.layouts import parameter_layouts
from models.mixer_config import BranchConfig, BranchMerge, SinkConfig, SinkRope
from models.spiking.neurons import Spikes
from tests.models.exported.folders import CASES, case

FORMAT = Format.synfire


def written(config: ModelConfig, **spiking: Any) -> dict[str, Any]:
    """The config.json as it is read from the disk."""
    raw = write_config(config, FORMAT, dtype=torch.float32, **spiking)
    read: dict[str, Any] = json.loads(json.dumps(raw))
    return read


class Listing:
    """Names and shapes of a folder of ours, without values."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = written(config)
        self.shapes = {
            str(theirs(name, FORMAT)): layout.global_shape
            for name, layout in parameter_layouts(config).items()
        }

    def names(self) -> tuple[str, ...]:
        return tuple(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def load(self, name: str) -> torch.Tensor:
        return torch.zeros(self.shapes[name])


def test_every_key_comes_back() -> None:
    sinks = SinkConfig(num_tokens=3, rope=SinkRope.none, through_linear=False)
    for changes in (*CASES.values(), {"sinks": sinks}, {"mixers": "L+S*3 _", "eos_token_id": 5}):
        config = case("all mixers", **changes)
        read = read_config(written(config))
        assert read.layers == config.layers
        patterns = {"mixers": config.mixers, "ffns": config.ffns}
        assert dataclasses.replace(read, **patterns) == config


def test_names_are_our_own_but_for_the_head() -> None:
    for name in parameter_layouts(case("softmax experts")):
        assert ours(str(theirs(name, FORMAT)), FORMAT) == name
    assert theirs("head.weight", FORMAT) == "lm_head.weight"
    assert ours("embedding.weight", FORMAT) is None


def test_spikes_come_back() -> None:
    spiking = SpikingConfig(neuron=NeuronKind.adaptive, k=9.0, max_count=4)
    raw = written(case("all mixers"), spiking=spiking, spikes=Spikes(k=2.0, blend=0.5))
    read = read_spikes(raw)
    assert read is not None
    assert read[0] == SpikingConfig(neuron=NeuronKind.adaptive, k=2.0, max_count=4)
    assert read[1] == Spikes(k=2.0, blend=0.5)
    assert read_spikes(written(case("all mixers"), spiking=spiking)) is None
    assert read_spikes({"model_type": "qwen2", "spiking": raw["spiking"]}) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_mixers": "L S F _"}, r"layer_mixers \(L S F _\) must be a list with one symbol"),
        ({"layer_ffns": [1, 2, 3, 4]}, r"layer_ffns \(\[1, 2, 3, 4\]\) must be a list with one"),
        ({"num_hidden_layers": 5}, r"config.json num_hidden_layers \(5\) must be 4"),
        ({"layer_ffns": ["d"]}, "config.json: .* must have as many layers as mixers"),
        ({"vocab_size": None}, "config.json.vocab_size: .*required"),
        ({"rope": {"theta": -1.0}}, r"config.json.rope: .*rope.theta \(-1.0\) must be above 0"),
        ({"moe": {"experts": 3}}, r"config.json.moe.experts: "),
        ({"flavour": "new"}, r"keys that Synfire would not honour: flavour \(new\)"),
        ({"spiking": {"k": 3.0}}, r"spiking \(\{'k': 3.0\}\) must be null or have k, blend and"),
    ],
)
def test_keys_that_we_would_not_honour_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_config({**written(case("all mixers")), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixers": "S F L+S L+F"}, r"layer 0 must stay L\+S as in the source: got S"),
        ({"mixers": "L+S F F+L L+F"}, r"layer 2 must stay L\+S as in the source: got F\+L"),
        ({"ffns": "e d e e"}, r"ffns \(e d e e\) layer 1 must stay e as in the source: got d"),
        ({"ffns": "d*4"}, r"ffns \(d\*4\) layer 0 must stay e as in the source"),
        (
            {"branches": BranchConfig(merge=BranchMerge.mean)},
            r"model.branches.merge \(mean\) must equal the source's, which has X\+Y lay.*got sum",
        ),
        (
            {"sinks": SinkConfig(num_tokens=3)},
            r"model.sinks.num_tokens \(3\) must equal the source's, which has sinks: got 2. Leave",
        ),
        (
            {"moe": CASES["sigmoid experts"]["moe"]},
            r"model.moe.num_experts \(5\) must equal the source's, which has e layers: got 4",
        ),
    ],
)
def test_layers_that_no_conversion_makes(changes: dict[str, Any], message: str) -> None:
    config = case("softmax experts", sinks=SinkConfig(num_tokens=2))
    with pytest.raises(ValueError, match=message):
        plan_conversion(Listing(config), dataclasses.replace(config, **changes))


def test_layers_beside_branches_and_experts_may_change() -> None:
    config = case("softmax experts", sinks=SinkConfig(num_tokens=2))
    plan = plan_conversion(Listing(config), dataclasses.replace(config, mixers="L+S L _ L+F"))
    kinds = {tensor.origin.kind.value for tensor in plan}
    assert kinds == {"copied", "new"}
