from __future__ import annotations

import pytest
import torch

from models.block import Blocks
from models.config import NeuronKind, SpikingConfig
from models.sequence import SequenceContext
from models.spiking.neurons import Spikes
from models.spiking.recorder import SpikeRecorder
from tests.models.tiny import tiny_config, tiny_model
from tests.support.closeness import assert_close


def test_a_block_adds_mixer_then_feed_forward_to_the_stream() -> None:
    block = tiny_model().blocks[0]
    sequence = SequenceContext.one_document_per_row(2, 7)
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    middle = x + block.mixer(block.mixer_norm(x), sequence)
    expected = middle + block.ffn(block.ffn_norm(middle))
    assert_close(block(x, sequence), expected, relative=1e-14)


def test_a_layer_without_mixer_is_its_feed_forward_half() -> None:
    block = tiny_model().blocks[3]
    assert block.mixer is None
    assert block.mixer_norm is None
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    expected = x + block.ffn(block.ffn_norm(x))
    assert_close(block(x, SequenceContext.one_document_per_row(2, 7)), expected, relative=1e-14)
    out, state = block.extend(x, None)
    assert state is None
    assert_close(out, expected, relative=1e-14)


@pytest.mark.parametrize(("layer", "has_mixer"), [(0, True), (1, True), (2, True), (3, False)])
def test_each_distinct_projection_input_is_encoded_once(layer: int, has_mixer: bool) -> None:
    model = tiny_model(tiny_config(), spiking=SpikingConfig(neuron=NeuronKind.adaptive))
    recorder = SpikeRecorder(num_tokens=1000)
    sequence = SequenceContext.one_document_per_row(2, 7)
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    block = model.blocks[layer]
    block(x, sequence, Spikes(k=3.0, recorder=recorder))
    widths = {"mixer_in": 24, "mixer_out": 32} if has_mixer else {}
    widths |= {"ffn_in": 24, "ffn_out": 40}
    counted = {site: float(sums[:-2].sum()) for site, sums in recorder.tensors().items()}
    assert counted == {f"{layer}/{site}": 2 * 7 * width for site, width in widths.items()}


def test_the_gate_reads_the_same_encoding_as_the_projections() -> None:
    model = tiny_model(tiny_config(), spiking=SpikingConfig(neuron=NeuronKind.adaptive))
    mixer = model.blocks[0].mixer
    seen: dict[str, torch.Tensor] = {}
    for name in ("q_proj", "k_proj", "v_proj", "gate_down"):
        getattr(mixer, name).register_forward_hook(
            lambda _, inputs, __, name=name: seen.__setitem__(name, inputs[0])
        )
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    mixer(x, SequenceContext.one_document_per_row(2, 7), Spikes(k=3.0))
    threshold = x.abs().mean(dim=-1, keepdim=True) / 3
    assert_close(seen["q_proj"], threshold * torch.round(x / threshold), relative=1e-14)
    assert all(torch.equal(value, seen["q_proj"]) for value in seen.values())


def test_blocks_are_found_by_their_layer_in_the_whole_model() -> None:
    blocks = tiny_model().blocks
    part = Blocks([blocks[2], blocks[3]])
    assert len(part) == 2
    assert [block.layer for block in part] == [2, 3]
    assert part[3] is blocks[3]
    assert {name.partition(".")[0] for name, _ in part.named_parameters()} == {"2", "3"}
    with pytest.raises(AttributeError, match="0"):
        part[0]
    assert list(Blocks([])) == []
