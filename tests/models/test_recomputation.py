"""What each kind of recomputation leaves as it is (every number) and what it saves (bytes)."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from models.config import ModelConfig, NeuronKind, SpikingConfig, ThresholdGrad
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
from models.sequence import SequenceContext
from models.spiking.neurons import Spikes
from models.spiking.recorder import SpikeRecorder
from tests.models.tiny import packed, random_tokens, tiny_config, tiny_model
from tests.support.kept_bytes import kept_bytes

ALL = frozenset(range(4))
KINDS = {
    "some blocks": Recomputation(blocks=frozenset({0, 2, 3})),
    "all blocks": Recomputation(blocks=ALL),
    "norms": Recomputation(norms=ALL),
    "activations": Recomputation(activations=ALL),
    "mixers": Recomputation(mixers=frozenset({0, 1, 2})),
    "all parts": Recomputation(norms=ALL, activations=ALL, mixers=frozenset({0, 1, 2})),
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
MODELS: dict[str, dict[str, Any]] = {
    "one mixer": {},
    "key-tied": {"linear": KEY_TIED},
} | {
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
    """Loss, gradients and spike statistics of packed documents."""
    config = tiny_config(qk_norm=True, **MODELS[name])
    model = tiny_model(config, spiking=spiking, recompute=recompute, dtype=dtype)
    tokens, sequence = random_tokens(2, 14), packed([[4, 9, 1], [13, 1]])
    recorder = SpikeRecorder(num_tokens=1000)
    is_on = spiking.neuron is NeuronKind.adaptive
    spikes = Spikes(k=3.0, recorder=recorder) if is_on else None
    loss = model(tokens, sequence, labels=tokens.roll(-1, dims=1), spikes=spikes)
    gradients = torch.autograd.grad(loss, tuple(model.parameters()))
    return loss.detach(), gradients, recorder.tensors()


_expected = functools.cache(functools.partial(_step, recompute=NOTHING))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("spiking", SPIKING)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_no_bit_changes_and_spikes_are_recorded_once(
    name: str, kind: str, spiking: str, dtype: torch.dtype
) -> None:
    loss, gradients, sums = _step(name, SPIKING[spiking], dtype, KINDS[kind])
    expected_loss, expected_gradients, expected_sums = _expected(name, SPIKING[spiking], dtype)
    assert torch.equal(loss, expected_loss)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        assert torch.equal(gradient, expected)
    assert list(sums) == list(expected_sums)
    assert bool(sums) == (spiking != "off")
    assert all(torch.equal(sums[site], value) for site, value in expected_sums.items())


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
    model = tiny_model(spiking=THROUGH, recompute=KINDS[kind])
    tokens, sequence = random_tokens(B, T), SequenceContext.one_document_per_row(B, T)
    model(tokens, sequence)  # The rotary tables stay.

    def work() -> None:
        loss = model(tokens, sequence, labels=tokens, spikes=Spikes(k=3.0))
        torch.autograd.grad(loss, tuple(model.parameters()))

    rotation = model.blocks[1].mixer.branches[0].core._rotary._rotation
    known = (*model.parameters(), tokens, rotation.cos, rotation.sin)
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
            Recomputation(blocks=frozenset({0, 1}), activations=frozenset({1, 2})),
            r"recompute.blocks \(\[1\]\) must not be named by another kind too",
        ),
    ],
)
def test_layers_that_do_not_fit_are_refused(recompute: Recomputation, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Model(tiny_config(), recompute=recompute)
