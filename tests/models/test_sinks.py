"""Sink tokens through the whole model: the slow twin, packing, decoding, what does not count."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from models import generation
from models.config import ModelConfig, NeuronKind, SpikingConfig
from models.conversion.block_stream import BlockStream, SampleRows, advance
from models.expert_config import ExpertConfig
from models.mixer_config import (
    BranchConfig,
    BranchMerge,
    BranchNorm,
    BranchProjections,
    FeatureMap,
    GateKind,
    LinearAttentionConfig,
    SinkConfig,
    SinkRope,
)
from models.mixture_of_experts import MixtureOfExperts
from models.model import Model
from models.part import ModelPart
from models.recomputation import Recomputation
from models.router import tie_order
from models.routing import Routing, RoutingRecorder
from models.sequence import SequenceContext
from models.spiking.neurons import Spikes
from models.spiking.recorder import SpikeRecorder
from tests.models.slow_sinks import SlowModel
from tests.models.tiny import packed, random_tokens, tiny_config, tiny_model
from tests.support.closeness import assert_close

S = 3
SEQUENCE = packed([[4, 9], [13]])
TOKENS, LABELS = random_tokens(2, 13), random_tokens(2, 13, seed=1)
ADAPTIVE = SpikingConfig(neuron=NeuronKind.adaptive)
TIED = LinearAttentionConfig(
    feature_map=FeatureMap.sigmoid, gate=GateKind.key_tied, gate_offset=1.0, gate_floor=0.05
)
MOE = ExpertConfig(
    num_experts=4, intermediate_size=10, balance_coefficient=0.5, z_loss_coefficient=0.1
)
APART = BranchConfig(
    projections=BranchProjections.separate,
    norm=BranchNorm.after_output,
    merge=BranchMerge.learned,
)
MODELS: dict[str, dict[str, Any]] = {
    "L S F _": {},
    "F": {"mixers": "F F", "ffns": "d d"},
    "S": {"mixers": "S S", "ffns": "d d"},
    "L": {"mixers": "L S", "ffns": "e d", "linear": TIED},
    "L+S L+F": {"mixers": "L+S L+F", "ffns": "d e", "linear": TIED},
    "mean": {
        "mixers": "S+L F+S", "ffns": "e d",
        "branches": BranchConfig(merge=BranchMerge.mean, projections=BranchProjections.separate),
    },
    "learned": {
        "mixers": "L+S L+F", "ffns": "d e", "branches": BranchConfig(merge=BranchMerge.learned),
    },
    "after": {
        "mixers": "L+S L+F", "ffns": "e d",
        "branches": BranchConfig(norm=BranchNorm.after_output, merge=BranchMerge.learned),
    },
    "apart": {"mixers": "L+F S+L", "ffns": "e e", "branches": APART},
}  # fmt: skip


def combinations() -> Iterator[Any]:
    """All of them; in every other one, which are quick, each value meets each of the others."""
    values = (MODELS, SinkRope, (True, False), (False, True))
    for places in itertools.product(*(enumerate(each) for each in values)):
        name, rope, through, spiking = (value for _, value in places)
        words = "through" if through else "past", "spikes" if spiking else "plain"
        yield pytest.param(
            name, rope, through, spiking,
            id="-".join((name, rope.value, *words)),
            marks=pytest.mark.slow if sum(place for place, _ in places) % 2 else (),
        )  # fmt: skip


COMBINATIONS = list(combinations())


def config_of(
    name: str, rope: SinkRope = SinkRope.before, through_linear: bool = True
) -> ModelConfig:
    sinks = SinkConfig(num_tokens=S, rope=rope, through_linear=through_linear)
    values = {"qk_norm": True, "output_bias": True, "sinks": sinks, "moe": MOE}
    return tiny_config(**(values | MODELS[name]))


def gradients(model: Model, loss: Tensor) -> dict[str, Tensor]:
    names = dict(model.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, tuple(names.values())), strict=True))


@pytest.mark.parametrize(("name", "rope", "through", "spiking"), COMBINATIONS)
def test_equals_sinks_in_front_of_every_document(
    name: str, rope: SinkRope, through: bool, spiking: bool
) -> None:
    config = config_of(name, rope, through)
    model = tiny_model(config, spiking=ADAPTIVE)
    slow = SlowModel(config, dict(model.named_parameters()), k=3.0 if spiking else None)
    spikes = Spikes(k=3.0) if spiking else None
    loss = model(TOKENS, SEQUENCE, labels=LABELS, spikes=spikes)
    expected = slow.losses(TOKENS, SEQUENCE, LABELS)
    assert_close(loss, expected, relative=1e-12, name="loss")
    found, wanted = gradients(model, loss), gradients(model, expected)
    assert float(wanted["sinks.weight"].abs().max()) > 1e-3
    for parameter, gradient in wanted.items():
        assert_close(found[parameter], gradient, relative=1e-10, absolute=1e-13, name=parameter)


@pytest.mark.parametrize("name", MODELS)
def test_a_packed_document_is_the_document(name: str) -> None:
    model = tiny_model(config_of(name))
    logits = model(TOKENS, SEQUENCE)
    alone = SequenceContext.one_document_per_row
    assert_close(logits[:1, :4], model(TOKENS[:1, :4], alone(1, 4)), relative=1e-12)
    assert_close(logits[:1, 4:], model(TOKENS[:1, 4:], alone(1, 9)), relative=1e-12)
    assert_close(logits[1:], model(TOKENS[1:], alone(1, 13)), relative=1e-12)


COPIED = (2, 8)
"""Tokens before which a decode state is copied: one while a window fills, one afterwards."""


@pytest.mark.parametrize(("name", "rope", "through", "spiking"), COMBINATIONS)
def test_decoding_is_the_forward_pass(
    name: str, rope: SinkRope, through: bool, spiking: bool
) -> None:
    model = tiny_model(config_of(name, rope, through), spiking=ADAPTIVE)
    spikes = Spikes(k=3.0) if spiking else None
    sequence = SequenceContext.one_document_per_row(2, 13)
    expected = model(TOKENS, sequence, spikes=spikes)
    for first, chunk in ((1, 1), (7, 3)):
        logits, state = generation.prefill(
            model, TOKENS[:, :first], chunk_tokens=chunk, spikes=spikes
        )
        assert_close(logits, expected[:, first - 1], relative=1e-11)
        for step in range(first, 13):
            kept = state.copy()
            logits, state = generation.decode_step(model, TOKENS[:, step], state, spikes=spikes)
            assert_close(logits, expected[:, step], relative=1e-11)
            if step in COPIED:
                again, _ = generation.decode_step(model, TOKENS[:, step], kept, spikes=spikes)
                assert torch.equal(logits, again)


def test_a_decode_state_counts_the_keys_of_sinks() -> None:
    bytes_of = {}
    for sinks in (0, S):
        config = tiny_config(mixers="F", ffns="d", sinks=SinkConfig(num_tokens=sinks))
        _, state = generation.prefill(tiny_model(config), TOKENS[:1])
        bytes_of[sinks] = state.num_bytes
    assert bytes_of[S] - bytes_of[0] == 2 * S * 2 * 8 * 8


@pytest.mark.parametrize("name", MODELS)
def test_nobody_counts_sinks(name: str) -> None:
    """Spike statistics are of the sites and tokens of a model without them; so is routing."""
    config = config_of(name)
    model = tiny_model(config, spiking=ADAPTIVE)
    recorder, routed = SpikeRecorder(1000), RoutingRecorder()
    routing = Routing(num_rows=6, num_tokens=90, recorder=routed)
    model(TOKENS, SEQUENCE, labels=LABELS, spikes=Spikes(3.0, recorder=recorder), routing=routing)
    plain = tiny_model(replace(config, sinks=SinkConfig()), spiking=ADAPTIVE)
    expected = SpikeRecorder(1000)
    plain(TOKENS, SEQUENCE, labels=LABELS, spikes=Spikes(3.0, recorder=expected))
    counts = [
        {site: float(sums[:-2].sum()) for site, sums in each.tensors().items()}
        for each in (recorder, expected)
    ]
    assert counts[0] == counts[1]
    for sums in routed.tensors(rank=0, num_ranks=1).values():
        assert float(sums[:4].sum()) == TOKENS.numel()


@pytest.mark.parametrize("name", ["L", "after"])
def test_router_losses_are_of_tokens_alone(name: str) -> None:
    config = config_of(name)
    model = tiny_model(config)
    slow = SlowModel(config, dict(model.named_parameters()))
    routing = Routing(num_rows=2, num_tokens=26)
    loss = model(TOKENS, SEQUENCE, labels=LABELS, routing=routing)
    expected = slow.losses(TOKENS, SEQUENCE, LABELS)
    assert_close(loss, expected, relative=1e-12)
    total = expected
    for documents in slow.logits.values():
        logits = torch.cat(documents).view(2, 13, 4)
        scores = logits.softmax(-1)
        fractions = torch.nn.functional.one_hot(scores.argmax(-1), 4).double().mean(dim=1)
        total = total + 0.5 * 4 * (fractions * scores.mean(dim=1)).sum(-1).mean()
        total = total + 0.1 * logits.logsumexp(-1).square().mean()
    found, wanted = gradients(model, loss), gradients(model, total)
    for parameter, gradient in wanted.items():
        assert_close(found[parameter], gradient, relative=1e-10, absolute=1e-13, name=parameter)


def test_sinks_take_no_capacity() -> None:
    """A capacity that drops tokens drops none of the sinks: their stream is that of evaluation."""
    moe = ExpertConfig(num_experts=4, intermediate_size=10, capacity_factor=0.5)
    config = tiny_config(
        mixers="F F", ffns="e d", moe=moe, sinks=SinkConfig(num_tokens=8), window_tokens=None
    )
    model, seen = tiny_model(config), []
    model.blocks[0].register_forward_hook(lambda _m, _i, out: seen.append(out))
    recorder = RoutingRecorder()
    model(TOKENS, SEQUENCE, routing=Routing(num_rows=2, num_tokens=26, recorder=recorder))
    model(TOKENS, SEQUENCE)
    (trained, sinks), (evaluated, as_evaluated) = seen
    assert float(recorder.tensors(rank=0, num_ranks=1)["0"][4]) > 0
    assert torch.equal(sinks, as_evaluated)
    assert not torch.equal(trained, evaluated)


def test_sinks_with_equal_scores_spread_over_experts() -> None:
    """In the order of positions of their own, in front of every document's."""
    config = tiny_config(
        mixers="F", ffns="e", moe=MOE, sinks=SinkConfig(num_tokens=16), window_tokens=None
    )
    model = tiny_model(config)
    ffn = model.blocks[0].ffn
    assert isinstance(ffn, MixtureOfExperts)
    with torch.no_grad():
        ffn.router.weight.zero_()
    plans: list[Tensor] = []
    ffn.experts.register_forward_pre_hook(lambda _m, args: plans.append(args[1].counts))
    model(TOKENS, SEQUENCE)
    order = tie_order(torch.arange(-16, 0), 4, seed=MOE.tie_break_seed, layer=0)
    assert plans[1].tolist() == torch.bincount(order.argmax(-1), minlength=4).tolist()
    sequence = SequenceContext.one_document_per_row(2, 13)
    logits, _ = generation.prefill(model, TOKENS, chunk_tokens=5)
    assert_close(logits, model(TOKENS, sequence)[:, -1], relative=1e-11)


ALL = frozenset({0, 1})
KINDS = {
    "blocks": Recomputation(blocks=ALL),
    "norms": Recomputation(norms=ALL),
    "activations": Recomputation(activations=ALL),
    "mixers": Recomputation(mixers=ALL),
    "experts": Recomputation(experts=frozenset({1})),
    "expert layers": Recomputation(expert_layers=frozenset({1}), norms=ALL, mixers=ALL),
    "all parts": Recomputation(norms=ALL, activations=ALL, mixers=ALL, experts=frozenset({1})),
}


@pytest.mark.parametrize("through", [True, False], ids=["through", "past"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["L+S L+F", "apart", "learned"])
def test_recomputation_changes_no_bit(name: str, kind: str, through: bool) -> None:
    config = config_of(name, through_linear=through)
    if name == "apart" and kind.startswith("expert"):
        config = config_of("learned", through_linear=through)
    results = []
    for recompute in (Recomputation(), KINDS[kind]):
        model = tiny_model(config, spiking=ADAPTIVE, recompute=recompute)
        recorder = SpikeRecorder(1000)
        routing = Routing(num_rows=2, num_tokens=26, recorder=RoutingRecorder())
        loss = model(
            TOKENS, SEQUENCE, labels=LABELS, spikes=Spikes(3.0, recorder=recorder),
            routing=routing,
        )  # fmt: skip
        results.append((loss, gradients(model, loss), recorder.summary()))
    (loss, found, statistics), (again, wanted, once_more) = results
    assert torch.equal(loss, again)
    assert statistics == once_more
    for parameter, gradient in wanted.items():
        assert torch.equal(found[parameter], gradient), parameter


@pytest.mark.parametrize("ends", [[1, 2], [0, 2, 2], [2, 2]], ids=str)
def test_parts_hand_on_both_streams(ends: list[int]) -> None:
    config = config_of("L+S L+F")
    model = tiny_model(config)
    values = dict(model.named_parameters())
    streams: tuple[Tensor, ...] = (TOKENS,)
    first = 0
    for index, end in enumerate(ends):
        stretch = ModelPart(first, end, index == 0, index == len(ends) - 1)
        part, first = Model(config, part=stretch).double(), end
        for name, parameter in part.named_parameters():
            parameter.data.copy_(values[name])
        sinks = streams[1] if index else None
        out = part(streams[0], SEQUENCE, sinks=sinks)
        losses = part.token_losses(streams[0], SEQUENCE, LABELS, sinks=sinks)
        streams = out if isinstance(out, tuple) else (out,)
    assert torch.equal(streams[0], model(TOKENS, SEQUENCE))
    assert torch.equal(losses, model.token_losses(TOKENS, SEQUENCE, LABELS))


def test_blocks_that_are_loaded_one_by_one_carry_sinks() -> None:
    config = config_of("L+S L+F")
    model = tiny_model(config)
    weights = dict(model.named_parameters())
    stream = BlockStream(config, lambda name: weights[name].data)
    rows = SampleRows(TOKENS, LABELS, SEQUENCE.document_ids)
    hidden, sinks = stream.embed(rows), stream.sinks()
    for layer in range(2):
        sinks = advance(stream.block(layer), hidden, rows.sequences(), sinks)
    found = stream.final_norm()(torch.cat(hidden))
    assert_close(found, model.hidden_states(TOKENS, SEQUENCE), relative=1e-12)


def test_sinks_that_no_layer_sees_are_refused() -> None:
    unseen = SinkConfig(num_tokens=S, through_linear=False)
    with pytest.raises(ValueError, match=r"sinks\.num_tokens \(3\) has no effect: no layer of"):
        tiny_config(mixers="L _", ffns="d d", sinks=unseen)
    tiny_config(mixers="L _", ffns="d d", sinks=SinkConfig(num_tokens=S))
