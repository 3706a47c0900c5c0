"""The layer of experts against every expert on every token, masked (`dense_experts`)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from models.config import ModelConfig, NeuronKind, SpikingConfig
from models.expert_config import Balance, ExpertConfig, RouterScore
from models.generation import DecodeState, decode_step, extend, prefill
from models.layouts import parameter_layouts
from models.mixture_of_experts import MixtureOfExperts
from models.model import Model
from models.routing import Routing, RoutingRecorder, StepRouting
from models.sequence import SequenceContext
from models.spiking.neurons import Spikes
from models.spiking.recorder import SpikeRecorder
from tests.models.dense_experts import made_dense
from tests.models.tiny import packed, random_tokens, tiny_config, tiny_model
from tests.support.closeness import assert_close

E = 4
PLAIN = ExpertConfig(num_experts=E, intermediate_size=10, balance_coefficient=0.5)
KINDS = {
    "top 1": PLAIN,
    "top 2, two shared": replace(PLAIN, top_k=2, num_shared_experts=2, z_loss_coefficient=0.1),
    "renormalised": replace(PLAIN, top_k=2, renormalise=True, balance=Balance.none),
    "sigmoid": replace(PLAIN, top_k=2, score=RouterScore.sigmoid, num_shared_experts=0),
    "capacity": replace(PLAIN, top_k=2, capacity_factor=0.75, z_loss_coefficient=0.1),
    "previous step": replace(PLAIN, balance=Balance.previous_step, score=RouterScore.sigmoid),
    "bias": replace(PLAIN, balance=Balance.bias),
    "microbatch": replace(PLAIN, balance=Balance.microbatch),
    "one expert": replace(PLAIN, num_experts=1),
    "all of them": replace(PLAIN, top_k=E, renormalise=True),
}
ADAPTIVE = SpikingConfig(neuron=NeuronKind.adaptive)
SEQUENCE = packed([[4, 9, 1], [13, 1]])
"""28 tokens, which no number of experts here divides evenly among them."""


def config_of(moe: ExpertConfig, **changes: Any) -> ModelConfig:
    return tiny_config(**({"mixers": "L F", "ffns": "d e", "moe": moe} | changes))


def gradients(model: Model, loss: Tensor) -> dict[str, Tensor]:
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, tuple(trained.values()))
    return dict(zip(trained, found, strict=True))


def _routing(recorder: RoutingRecorder | None = None) -> Routing:
    return Routing(num_rows=6, num_tokens=90, recorder=recorder)


@pytest.mark.parametrize("spiking", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_equals_every_expert_on_every_token(name: str, spiking: bool) -> None:
    """Loss and every gradient, the router's with its losses: a part of a larger step."""
    config = config_of(KINDS[name])
    tokens = random_tokens(2, 14)
    spikes = Spikes(k=3.0) if spiking else None
    model, oracle = (tiny_model(config, spiking=ADAPTIVE) for _ in range(2))
    layers = made_dense(oracle)
    inputs = {"labels": tokens.roll(-1, dims=1), "spikes": spikes, "routing": _routing()}
    loss = model(tokens, SEQUENCE, **inputs)
    expected = oracle(tokens, SEQUENCE, **inputs)
    assert_close(loss, expected, relative=1e-13, name="loss")
    total = expected + sum(layers[0].losses)
    found, wanted = gradients(model, loss), gradients(oracle, total)
    for parameter, gradient in wanted.items():
        assert_close(found[parameter], gradient, relative=1e-11, name=parameter)


def test_a_single_token_and_a_row_that_does_not_divide() -> None:
    for lengths in ([[1]], [[5], [5], [5]]):
        tokens = random_tokens(len(lengths), sum(lengths[0]))
        model, oracle = (tiny_model(config_of(KINDS["capacity"])) for _ in range(2))
        made_dense(oracle)
        inputs = {"labels": tokens, "routing": _routing()}
        out, expected = (m(tokens, packed(lengths), **inputs) for m in (model, oracle))
        assert_close(out, expected, relative=1e-13)


@pytest.mark.parametrize("name", ["top 1", "capacity"])
def test_all_tokens_to_one_expert(name: str) -> None:
    """The other experts' gradients are zeros; with a capacity most tokens are dropped."""
    moe = replace(KINDS[name], top_k=1)
    model, oracle = (tiny_model(config_of(moe)) for _ in range(2))
    tokens = random_tokens(2, 14)
    for built in (model, oracle):
        layer = built.blocks[1]
        assert isinstance(layer.ffn, MixtureOfExperts)
        with torch.no_grad():
            # Normed tokens have a component of one sign along this row.
            layer.ffn_norm.weight.zero_()
            layer.ffn_norm.weight[0] = 1.0
            layer.ffn.router.weight.zero_()
            layer.ffn.router.weight[2] = 0.0
        layer.ffn_norm.register_forward_hook(lambda _m, _i, out: out.abs() + 1.0)
        with torch.no_grad():
            layer.ffn.router.weight[2] = 0.5
    layers = made_dense(oracle)
    recorder = RoutingRecorder()
    loss = model(tokens, SEQUENCE, labels=tokens, routing=_routing(recorder))
    expected = oracle(tokens, SEQUENCE, labels=tokens, routing=_routing())
    assert layers[0].counts.tolist() == [0, 0, 28, 0]
    found = gradients(model, loss)
    wanted = gradients(oracle, expected + sum(layers[0].losses))
    for parameter, gradient in wanted.items():
        assert_close(found[parameter], gradient, relative=1e-11, absolute=1e-14, name=parameter)
    assert not found["blocks.1.ffn.experts.up_proj.weight"][[0, 1, 3]].any()
    step = StepRouting.of(recorder.tensors(rank=0, num_ranks=1), moe, num_tokens=tokens.numel())
    metrics = step.metrics()
    assert metrics["moe/1/dead_experts"] == 3
    assert metrics["moe/1/load_max"] == 1.0
    kept = 2 * 3 if name == "capacity" else 28
    assert metrics["moe/1/dropped_share"] == pytest.approx(1 - kept / 28)


def test_evaluation_drops_nobody_and_has_no_losses() -> None:
    moe = KINDS["capacity"]
    dropless = replace(moe, capacity_factor=None)
    tokens = random_tokens(2, 14)
    tight, loose = tiny_model(config_of(moe)), tiny_model(config_of(dropless))
    with torch.no_grad():
        assert torch.equal(tight(tokens, SEQUENCE), loose(tokens, SEQUENCE))
        trained = tight(tokens, SEQUENCE, routing=_routing())
    assert not torch.equal(trained, tight(tokens, SEQUENCE))
    silent = gradients(tight, tight(tokens, SEQUENCE, labels=tokens))
    bare = tiny_model(config_of(replace(dropless, balance=Balance.none, z_loss_coefficient=0.0)))
    expected = gradients(bare, bare(tokens, SEQUENCE, labels=tokens, routing=_routing()))
    name = "blocks.1.ffn.router.weight"
    assert_close(silent[name], expected[name], relative=1e-13)


@pytest.mark.parametrize("name", ["top 1", "top 2, two shared"])
def test_packed_separate_and_decoded_documents_choose_alike(name: str) -> None:
    """Also where every token is a tie, which its position in the document breaks."""
    for zero in (False, True):
        model = tiny_model(config_of(KINDS[name]))
        if zero:
            model.blocks[1].ffn.router.weight.data.zero_()  # type: ignore[union-attr]
        lengths = [6, 3, 5]
        tokens = random_tokens(1, sum(lengths))
        with torch.no_grad():
            together = model(tokens, packed([lengths]))
        for part, whole in zip(tokens.split(lengths, 1), together.split(lengths, 1), strict=True):
            count = part.shape[1]
            with torch.no_grad():
                alone = model(part, SequenceContext.one_document_per_row(1, count))
            assert_close(alone, whole, relative=1e-12, name="separate")
            logits, state = prefill(model, part[:, :2], chunk_tokens=1)
            assert_close(logits, whole[:, 1], relative=1e-12, name="prefill")
            for token in range(2, count):
                logits, state = decode_step(model, part[:, token], state)
                assert_close(logits, whole[:, token], relative=1e-12, name="decoded")
            hidden, _ = extend(model, part, DecodeState.start(model))
            assert_close(model.apply_head(hidden), whole, relative=1e-12, name="extended")


def test_experts_read_one_encoding_and_the_router_none() -> None:
    """Counts at the input are those of the normed x; the router's x is the normed x itself."""
    moe = KINDS["top 2, two shared"]
    model = tiny_model(config_of(moe), spiking=ADAPTIVE)
    layer = model.blocks[1].ffn
    assert isinstance(layer, MixtureOfExperts)
    seen: dict[str, Tensor] = {}
    layer.router.register_forward_hook(lambda _m, args, _o: seen.update(router=args[0]))
    layer.experts.register_forward_hook(lambda _m, args, _o: seen.update(experts=args[0]))
    assert layer.shared is not None
    layer.shared.gate_proj.register_forward_hook(lambda _m, args, _o: seen.update(shared=args[0]))
    recorder = SpikeRecorder(1000)
    tokens = random_tokens(2, 14)
    with torch.no_grad():
        model(tokens, SEQUENCE, spikes=Spikes(k=3.0, recorder=recorder))
    x = seen["router"]
    threshold = x.abs().mean(-1, keepdim=True) / 3.0
    spiked = threshold * torch.round(x / threshold)
    assert_close(seen["shared"], spiked, relative=1e-14)
    chosen = layer.router.choose(layer.router(x), SEQUENCE.positions).experts
    flat = chosen.flatten().argsort(stable=True)
    assert_close(seen["experts"], spiked.flatten(0, 1)[flat // 2], relative=1e-14)
    values = {site: int(sums[:-2].sum()) for site, sums in recorder.tensors().items()}
    assert {site: count for site, count in values.items() if site.startswith("1/ffn")} == {
        "1/ffn_in": 28 * 24, "1/ffn_out": 28 * 2 * 10,
    }  # fmt: skip
    assert values["1/expert_out"] == 28 * 2 * 10


def test_dropped_tokens_are_no_spikes() -> None:
    model = tiny_model(config_of(KINDS["capacity"]), spiking=ADAPTIVE)
    spiking, routing = SpikeRecorder(1000), RoutingRecorder()
    tokens = random_tokens(2, 14)
    model(tokens, SEQUENCE, spikes=Spikes(k=3.0, recorder=spiking), routing=_routing(routing))
    dropped = float(routing.tensors(rank=0, num_ranks=1)["1"][E])
    assert dropped > 0
    assert int(spiking.tensors()["1/expert_out"][:-2].sum()) == (28 * 2 - dropped) * 10


def test_the_table_names_every_parameter_and_state() -> None:
    for moe in KINDS.values():
        config = config_of(moe)
        with torch.device("meta"):
            model = Model(config)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        table = parameter_layouts(config)
        assert {name: layout.global_shape for name, layout in table.items()} == shapes
        states = {name for name, layout in table.items() if layout.is_state}
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        assert states == frozen
