"""What each kind of recomputation leaves as it is (every number) and what it saves (bytes)."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import set_checkpoint_early_stop

from models.config import ModelConfig, NeuronKind, SpikingConfig, ThresholdGrad
from models.expert_config import ExpertConfig
from models.mixer_config import (
    BranchConfig,
    BranchMerge,
    BranchNorm,
    BranchProjections,
    FeatureMap,
    GateKind,
    LinearAttentionConfig,
)
from models.model import Model
from models.recomputation import NOTHING, Recomputation
from models.routing import Routing, RoutingRecorder
from models.sequence import SequenceContext
from models.spiking.neurons import Spikes
from models.spiking.recorder import SpikeRecorder
from tests.models.tiny import packed, random_tokens, tiny_config, tiny_model
from tests.support.kept_bytes import kept_bytes

ALL = frozenset(range(4))
MOE = ExpertConfig(
    num_experts=3, top_k=2, intermediate_size=10, capacity_factor=0.75, z_loss_coefficient=0.1,
    balance_coefficient=0.5,
)  # fmt: skip
CONFIG = tiny_config(qk_norm=True, ffns="d e d e", moe=MOE)
KINDS = {
    "some blocks": Recomputation(blocks=frozenset({0, 2, 3})),
    "all blocks": Recomputation(blocks=ALL),
    "norms": Recomputation(norms=ALL),
    "activations": Recomputation(activations=ALL),
    "mixers": Recomputation(mixers=frozenset({0, 1, 2})),
    "all parts": Recomputation(norms=ALL, activations=ALL, mixers=frozenset({0, 1, 2})),
    "experts": Recomputation(experts=frozenset({1, 3})),
    "expert layers": Recomputation(expert_layers=frozenset({1, 3})),
    "parts of experts": Recomputation(norms=ALL, activations=ALL, experts=frozenset({1, 3})),
    "all": Recomputation(
        norms=ALL, activations=ALL, mixers=frozenset({0, 1, 2}), expert_layers=frozenset({1, 3})
    ),
    "mixed": Recomputation(
        blocks=frozenset({1}), norms=frozenset({0, 3}), mixers=frozenset({0, 2})
    ),
}
OFF = SpikingConfig()
DETACHED = SpikingConfig(neuron=NeuronKind.adaptive)
THROUGH = SpikingConfig(neuron=NeuronKind.adaptive, threshold_grad=ThresholdGrad.through)
SPIKING = {"off": OFF, "detached": DETACHED, "through": THROUGH}


KEY_TIED = LinearAttentionConfig(
    feature_map=FeatureMap.sigmoid, gate=GateKind.key_tied, gate_offset=1.0, gate_floor=0.1
)
SINGLE: dict[str, dict[str, Any]] = {"one mixer": {}, "key-tied": {"linear": KEY_TIED}}
MODELS = SINGLE | {
    f"branches {projections.name} {norm.name}": {
        "mixers": "L+S F+L S+F _",
        "linear": LinearAttentionConfig() if norm is BranchNorm.before_output else KEY_TIED,
        "branches": BranchConfig(projections=projections, norm=norm, merge=BranchMerge.learned),
    }
    for projections, norm in itertools.product(BranchProjections, BranchNorm)
}


def _step(
    name: str, spiking: SpikingConfig, dtype: torch.dtype, recompute: Recomputation
) -> tuple[Tensor, tuple[Tensor, ...], dict[str, Tensor]]:
    """Loss, gradients and statistics, of spikes and routers, of packed documents."""
    config = replace(CONFIG, **MODELS[name])
    model = tiny_model(config, spiking=spiking, recompute=recompute, dtype=dtype)
    tokens, sequence = random_tokens(2, 14), packed([[4, 9, 1], [13, 1]])
    recorder, routers = SpikeRecorder(num_tokens=1000), RoutingRecorder()
    routing = Routing(num_rows=2, num_tokens=28, recorder=routers)
    is_on = spiking.neuron is NeuronKind.adaptive
    spikes = Spikes(k=3.0, recorder=recorder) if is_on else None
    labels = tokens.roll(-1, dims=1)
    loss = model(tokens, sequence, labels=labels, spikes=spikes, routing=routing)
    gradients = torch.autograd.grad(loss, tuple(model.parameters()))
    recorded = recorder.tensors() | routers.tensors(rank=0, num_ranks=1)
    return loss.detach(), gradients, recorded


_expected = functools.cache(functools.partial(_step, recompute=NOTHING))


@pytest.mark.parametrize("spiking", SPIKING)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "dtype"), [("one mixer", torch.float32), *((name, torch.float64) for name in MODELS)]
)
def test_no_bit_changes_and_statistics_are_recorded_once(
    name: str, kind: str, spiking: str, dtype: torch.dtype
) -> None:
    loss, gradients, sums = _step(name, SPIKING[spiking], dtype, KINDS[kind])
    expected_loss, expected_gradients, expected_sums = _expected(name, SPIKING[spiking], dtype)
    assert torch.equal(loss, expected_loss)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        assert torch.equal(gradient, expected)
    assert list(sums) == list(expected_sums)
    own_outputs = 3 if name in (*SINGLE, "branches shared before_output") else 6
    assert len(sums) == (2 if spiking == "off" else 2 + 3 + own_outputs + 4 * 2 + 2)
    assert all(torch.equal(sums[site], value) for site, value in expected_sums.items())


def test_blocks_that_run_again_to_their_end_record_once() -> None:
    """Torch stops as soon as it has what it needs, by default."""
    with set_checkpoint_early_stop(False):
        _, _, sums = _step("one mixer", DETACHED, torch.float64, KINDS["all blocks"])
    expected = _expected("one mixer", DETACHED, torch.float64)[2]
    assert all(torch.equal(sums[site], value) for site, value in expected.items())


B, T = 2, 14
D, F, N, G, H = 24, 40, 4, 2, 8
"""Hidden, ffn, query heads, key-value heads and head dim of `tiny_config`."""
FLOAT64 = 8


def _kept(
    config: ModelConfig,
    recompute: Recomputation,
    spiking: SpikingConfig = OFF,
    dtype: torch.dtype = torch.float64,
) -> int:
    """Bytes between forward and backward pass."""
    model = tiny_model(config, spiking=spiking, recompute=recompute, dtype=dtype)
    tokens, sequence = random_tokens(B, T), SequenceContext.one_document_per_row(B, T)
    spikes = Spikes(k=3.0) if spiking.neuron is NeuronKind.adaptive else None
    return kept_bytes(
        lambda: model(tokens, sequence, labels=tokens, spikes=spikes),
        besides=(*model.parameters(), tokens),
    )


# Numbers a token. A norm's output, with the inverse RMS that its gradient needs.
NORM = D + 1
# The head norm of L puts out all heads and has an inverse RMS for each.
HEAD_NORM = N * H + N
# A threshold that is differentiated keeps its input, itself before it is bounded, and after.
THRESHOLD = 2
# The first 5 tokens see fewer keys than a window of 5: one causal call, output and normaliser.
WINDOW_START = 5 * (N * H + N)
# The other 9: keys and values with a halo of 4, queries by head, output, normaliser, both joined.
WINDOW_REST = 2 * 13 * G * H + 9 * (2 * N * H + N) + T * N * H
WINDOW_MASK = 18 * 13
SAVED = {
    ("L", "norms", "off"): B * T * (2 * NORM + HEAD_NORM),
    ("F", "norms", "off"): B * T * 2 * NORM,
    ("_", "norms", "off"): B * T * NORM,
    ("L", "norms", "detached"): B * T * (2 * NORM + HEAD_NORM),
    ("L", "norms", "through"): B * T * (2 * (NORM + D + THRESHOLD) + HEAD_NORM + N * H + THRESHOLD),
    # silu(gate) and the product.
    ("S", "activations", "off"): B * T * 2 * F,
    ("S", "activations", "detached"): B * T * 2 * F,
    ("S", "activations", "through"): B * T * (3 * F + THRESHOLD),
    # Head outputs and normalisers; rotated q and k make way for q and k.
    ("F", "mixers", "off"): B * T * (N * H + N),
    # And what their spikes are.
    ("F", "mixers", "detached"): B * T * (2 * N * H + N),
    ("S", "mixers", "off"): B * (WINDOW_START + WINDOW_REST) + WINDOW_MASK,
    # The gate before and after its log-sigmoid and torch's buffer for it, the state that enters,
    # head outputs, the head norm.
    ("L", "mixers", "off"): B * (T * (3 * G * H + N * H + HEAD_NORM) + G * H * H),
}


@pytest.mark.parametrize(("mixer", "kind", "spiking"), SAVED)
def test_bytes_saved_are_those_of_the_tensors_that_go(mixer: str, kind: str, spiking: str) -> None:
    config = tiny_config(mixers=mixer, ffns="d")
    again = Recomputation(**{kind: frozenset({0})})
    saved = _kept(config, NOTHING, SPIKING[spiking]) - _kept(config, again, SPIKING[spiking])
    assert saved == SAVED[mixer, kind, spiking] * FLOAT64


def test_the_gates_wide_copy_goes_with_the_norms() -> None:
    """bfloat16: the gate reads its input in float32, norms keep their inverse RMS in it."""
    config = tiny_config(mixers="L", ffns="d")
    kept = [
        _kept(config, again, DETACHED, torch.bfloat16)
        for again in (NOTHING, Recomputation(norms=frozenset({0})))
    ]
    mixer, ffn, heads = 2 * D + 4 * D + 4, 2 * D + 4, 2 * N * H + 4 * N
    assert kept[0] - kept[1] == B * T * (mixer + ffn + heads)


def test_another_recomputed_block_keeps_its_input_alone() -> None:
    kept = [
        _kept(
            tiny_config(mixers=f"L*{count}", ffns=f"d*{count}"),
            Recomputation(blocks=frozenset(range(count))),
            DETACHED,
        )
        for count in (1, 2)
    ]
    assert kept[1] - kept[0] == B * T * D * FLOAT64


E, K, M = 3, 2, B * T * 2
"""Experts, choices of a token, rows of all experts."""
INNER, SHARED = 10, 10
EXPERTS = (
    # Rows, gate, up, silu(gate) and the product of routed and shared experts; what experts return.
    M * (D + 4 * INNER + D) + B * T * 4 * SHARED
)
SAVED_OF_EXPERTS = {
    "norms": B * T * NORM + M * D,
    "activations": M * 2 * INNER + B * T * 2 * SHARED,
    "experts": EXPERTS,
    # Scores, weights and choices; who goes where stays.
    "expert_layers": EXPERTS + B * T * (E + K + K),
}


@pytest.mark.parametrize("kind", SAVED_OF_EXPERTS)
def test_bytes_saved_in_expert_layers(kind: str) -> None:
    moe = ExpertConfig(num_experts=E, top_k=K, intermediate_size=INNER)
    config = tiny_config(mixers="_", ffns="e", moe=moe)
    again = Recomputation(**{kind: frozenset({0})})
    saved = _kept(config, NOTHING) - _kept(config, again)
    assert saved == SAVED_OF_EXPERTS[kind] * FLOAT64


def test_the_routers_wide_copy_goes_with_the_activations() -> None:
    """bfloat16: the router reads its input, and here its weight, in float32."""
    moe = ExpertConfig(num_experts=E, top_k=K, intermediate_size=INNER)
    config = tiny_config(mixers="_", ffns="e", moe=moe)
    kept = [
        _kept(config, again, dtype=torch.bfloat16)
        for again in (NOTHING, Recomputation(activations=frozenset({0})))
    ]
    assert kept[0] - kept[1] == 2 * SAVED_OF_EXPERTS["activations"] + 4 * (B * T + E) * D


@pytest.mark.parametrize("kind", ["norms", "activations", "mixers"])
def test_other_layers_keep_everything(kind: str) -> None:
    config = tiny_config(mixers="F F", ffns="d*2")
    none, one, both = (
        _kept(config, Recomputation(**{kind: frozenset(layers)}), DETACHED)
        for layers in ((), (1,), (0, 1))
    )
    assert none - one == one - both > 0


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_after_the_backward_pass(kind: str) -> None:
    model = tiny_model(CONFIG, spiking=THROUGH, recompute=KINDS[kind])
    tokens, sequence = random_tokens(B, T), SequenceContext.one_document_per_row(B, T)
    model(tokens, sequence)  # The rotary tables stay.

    def work() -> None:
        routing = Routing(num_rows=B, num_tokens=B * T)
        loss = model(tokens, sequence, labels=tokens, spikes=Spikes(k=3.0), routing=routing)
        torch.autograd.grad(loss, tuple(model.parameters()))

    rotation = model.blocks[1].mixer.branches[0].core._rotary._rotation
    known = (*model.parameters(), tokens, sequence.positions, rotation.cos, rotation.sin)
    assert kept_bytes(work, besides=known) == 0


@pytest.mark.parametrize(
    ("recompute", "message"),
    [
        (
            Recomputation(blocks=frozenset({-1, 1, 4})),
            r"recompute.blocks \(\[-1, 4\]\) must be block indices.*got 4",
        ),
        (Recomputation(norms=frozenset({7})), r"recompute.norms \(\[7\]\) must be block indices"),
        (
            Recomputation(mixers=ALL),
            r"recompute.mixers \(\[3\]\) must be layers with a mixer: got L",
        ),
        (
            Recomputation(experts=frozenset({0, 1})),
            r"recompute.experts \(\[0\]\) must be layers of experts: got d e d e",
        ),
        (
            Recomputation(expert_layers=frozenset({2, 3})),
            r"recompute.expert_layers \(\[2\]\) must be layers of experts: got d e d e",
        ),
        (
            Recomputation(experts=frozenset({1, 3}), expert_layers=frozenset({3})),
            r"recompute.expert_layers \(\[3\]\) must not be in experts too",
        ),
        (
            Recomputation(blocks=frozenset({3}), expert_layers=frozenset({3})),
            r"recompute.blocks \(\[3\]\) must not be named by another kind too",
        ),
        (
            Recomputation(blocks=frozenset({0, 1}), activations=frozenset({1, 2})),
            r"recompute.blocks \(\[1\]\) must not be named by another kind too",
        ),
    ],
)
def test_layers_that_do_not_fit_are_refused(recompute: Recomputation, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Model(CONFIG, recompute=recompute)
