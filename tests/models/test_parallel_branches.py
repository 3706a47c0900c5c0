"""Parallel branches `X+Y` against a slow twin, their two switches, and what every mixer does."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from models import generation
from models.config import ModelConfig, NeuronKind, SpikingConfig
from models.mixer import Mixer
from models.mixer_config import (
    BranchConfig,
    BranchMerge,
    BranchNorm,
    BranchProjections,
    FeatureMap,
    GateKind,
    LinearAttentionConfig,
)
from models.reference import linear_attention, softmax_attention
from models.rotary import Rotary, rotate
from models.sequence import SequenceContext
from models.spiking.neurons import Spikes
from models.spiking.recorder import SpikeRecorder
from tests.models.tiny import packed, random_tokens, tiny_config, tiny_model
from tests.support.closeness import assert_close

D, N, G, H = 24, 4, 2, 8
"""Hidden, query heads, key-value heads and head dim of `tiny_config`."""
TIED = LinearAttentionConfig(
    feature_map=FeatureMap.sigmoid, gate=GateKind.key_tied, gate_offset=1.0, gate_floor=0.05
)
SWITCHES = {
    f"{projections.name} {norm.name} {merge.name}": BranchConfig(
        projections=projections, norm=norm, merge=merge
    )
    for projections, norm, merge in itertools.product(BranchProjections, BranchNorm, BranchMerge)
}
PAIRS = ["L+S", "L+F", "F+S", "S+L"]
KIND_OF = {"L": "linear", "S": "sliding_window", "F": "full"}


def branch_config(switches: str, pair: str = "L+S", **changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "mixers": pair, "ffns": "d", "branches": SWITCHES[switches], "qk_norm": True,
        "output_bias": True,
    }  # fmt: skip
    return tiny_config(**(values | changes))


def mixer_of(config: ModelConfig, **options: Any) -> Mixer:
    mixer = tiny_model(config, **options).blocks[0].mixer
    assert mixer is not None
    return mixer


def draw(tokens: int, rows: int = 2) -> Tensor:
    return torch.randn(rows, tokens, D, generator=torch.Generator().manual_seed(1)).double()


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * weight


def by_hand(
    config: ModelConfig, weights: dict[str, Tensor], x: Tensor, sequence: SequenceContext
) -> Tensor:
    """Every step in the order that `models.mixer` describes, from the weights alone."""
    branches = config.branches
    is_shared = branches.projections is BranchProjections.shared
    is_before = branches.norm is BranchNorm.before_output
    factors = {
        BranchMerge.sum: torch.ones(2).double(),
        BranchMerge.mean: torch.ones(2).double() / 2,
        BranchMerge.learned: weights.get("merge.weight"),
    }[branches.merge]
    outputs = []
    for index, letter in enumerate(config.mixers.split("+")):
        own = f"{KIND_OF[letter]}."
        home = "" if is_shared else own

        def project(y: Tensor, name: str, home: str = home) -> Tensor:
            return y @ weights[f"{home}{name}.weight"].T + weights[f"{home}{name}.bias"]

        rows, tokens = x.shape[:2]
        q, k, v = (
            project(x, f"{name}_proj").view(rows, tokens, heads, H)
            for name, heads in (("q", N), ("k", G), ("v", G))
        )
        q, k = rms(q, weights[f"{home}q_norm.weight"]), rms(k, weights[f"{home}k_norm.weight"])
        if letter == "L":
            z = x @ weights[f"{own}gate_down.weight"].T @ weights[f"{own}gate_up.weight"].T
            z = z + weights[f"{own}gate_up.bias"]
            decay = (torch.sigmoid(z).log() / 16).view(rows, tokens, G, H)
            heads = linear_attention(
                q.relu(), k.relu(), v, decay, scale=H**-0.5, sequence=sequence
            )[0]
        else:
            rotation = Rotary(config).compute(sequence.positions, x.dtype)
            window = config.window_tokens if letter == "S" else None
            heads = softmax_attention(
                rotate(q, rotation), rotate(k, rotation), v,
                scale=H**-0.5, window=window, sequence=sequence,
            )  # fmt: skip
        if letter == "L" or is_before:
            heads = rms(heads, weights[f"{own}head_norm.weight"])
        if is_before:
            outputs.append((factors[index] * heads, home))
        else:
            out = project(heads.flatten(2), "o_proj")
            outputs.append((factors[index] * rms(out, weights[f"{own}output_norm.weight"]), home))
    if not is_before:
        return outputs[0][0] + outputs[1][0]
    projected = [heads.flatten(2) @ weights[f"{home}o_proj.weight"].T for heads, home in outputs]
    biases = {home: weights[f"{home}o_proj.bias"] for _, home in outputs}
    return projected[0] + projected[1] + sum(biases.values())


@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize("pair", PAIRS)
def test_branches_are_their_slow_twin_forward_and_backward(switches: str, pair: str) -> None:
    config = branch_config(switches, pair)
    mixer, x, sequence = mixer_of(config), draw(13).requires_grad_(), packed([[4, 9], [13]])
    weights = dict(mixer.named_parameters())
    out, expected = mixer(x, sequence), by_hand(config, weights, x, sequence)
    assert_close(out, expected, relative=1e-12)
    probe, leaves = torch.randn_like(out), (x, *weights.values())
    actual = torch.autograd.grad(out, leaves, probe)
    wanted = torch.autograd.grad(expected, leaves, probe)
    for name, gradient, twin in zip(("x", *weights), actual, wanted, strict=True):
        assert_close(gradient, twin, relative=1e-11, name=name)


def test_head_outputs_of_each_branch_can_be_had_before_their_norms() -> None:
    mixer, x, sequence = (
        mixer_of(branch_config("separate before_output sum")),
        draw(13),
        packed([[4, 9], [13]]),
    )
    outputs = [
        branch.projections.o_proj(branch.core.head_norm(heads).flatten(2))
        for branch, heads in zip(mixer.branches, mixer.attend(x, sequence), strict=True)
    ]
    assert_close(outputs[0] + outputs[1], mixer(x, sequence), relative=1e-14)


@pytest.mark.parametrize("letter", ["L", "S"])
def test_weights_1_and_0_leave_the_single_branch(letter: str) -> None:
    """`L` has the same norm alone; for `S` it is taken off, which keeps it from being 1."""
    config = branch_config("shared before_output learned", output_bias=False)
    mixer, x = mixer_of(config), draw(13)
    assert mixer.merge is not None
    with torch.no_grad():
        mixer.merge.weight.copy_(torch.tensor([1.0, 0.0] if letter == "L" else [0.0, 1.0]))
    single = mixer_of(branch_config("shared before_output sum", letter, output_bias=False))
    own = dict(mixer.named_parameters())
    for name, parameter in single.named_parameters():
        known = own.get(name, own.get(f"{KIND_OF[letter]}.{name}"))
        parameter.data.copy_(known)
    sequence = packed([[4, 9], [13]])
    expected = single(x, sequence)
    if letter == "S":
        (heads,) = single.attend(x, sequence)
        heads = rms(heads, own["sliding_window.head_norm.weight"])
        expected = single.branches[0].projections.o_proj(heads.flatten(2))
    assert_close(mixer(x, sequence), expected, relative=1e-12)


@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize("linear", [LinearAttentionConfig(), TIED], ids=["low-rank", "key-tied"])
def test_decoding_is_the_full_forward(switches: str, linear: LinearAttentionConfig) -> None:
    config = branch_config(switches, "L+S L+F F+S S", ffns="d*4", linear=linear)
    model = tiny_model(config, spiking=SpikingConfig(neuron=NeuronKind.adaptive))
    tokens, spikes = random_tokens(2, 19), Spikes(k=3.0)
    whole = SequenceContext.one_document_per_row(2, 19)
    expected = model(tokens, whole, spikes=spikes)
    logits, state = generation.prefill(model, tokens[:, :14], chunk_tokens=6, spikes=spikes)
    assert_close(logits, expected[:, 13], relative=1e-10)
    for index in range(14, 19):
        logits, state = generation.decode_step(model, tokens[:, index], state, spikes=spikes)
        assert_close(logits, expected[:, index], relative=1e-10)


def test_a_copied_state_of_branches_is_independent_and_measured() -> None:
    model = tiny_model(tiny_config(mixers="L+S", ffns="d"))
    tokens = random_tokens(1, 12)
    _, state = generation.prefill(model, tokens)
    # A matrix a key-value head; keys and values of a window, each of 8 bytes a number.
    assert state.num_bytes == 8 * (G * H * H + 2 * 5 * G * H)
    other = state.copy()
    for _ in range(6):
        _, state = generation.decode_step(model, torch.tensor([5]), state)
    logits, _ = generation.decode_step(model, torch.tensor([9]), other)
    again = torch.cat([tokens, torch.tensor([[9]])], dim=1)
    expected = model(again, SequenceContext.one_document_per_row(1, 13))
    assert_close(logits, expected[:, -1], relative=1e-11)


@pytest.mark.parametrize("switches", SWITCHES)
def test_packed_documents_mix_as_if_alone(switches: str) -> None:
    mixer, x, lengths = mixer_of(branch_config(switches)), draw(13), [[4, 9], [1, 12]]
    together = mixer(x, packed(lengths))
    for row, documents in enumerate(lengths):
        start = 0
        for length in documents:
            where = (slice(row, row + 1), slice(start, start + length))
            alone = mixer(x[where], SequenceContext.one_document_per_row(1, length))
            assert_close(together[where], alone, relative=1e-12)
            start += length


@pytest.mark.parametrize("switches", SWITCHES)
def test_the_input_is_encoded_once_and_heads_once_an_output_projection(switches: str) -> None:
    config = branch_config(switches)
    mixer = mixer_of(config, spiking=SpikingConfig(neuron=NeuronKind.adaptive))
    recorder = SpikeRecorder(num_tokens=1000)
    seen: dict[str, list[Tensor]] = {"in": [], "out": []}
    for name, module in mixer.named_modules():
        leaf = name.rpartition(".")[2]
        if leaf in ("q_proj", "k_proj", "v_proj", "gate_down", "o_proj"):
            kind = "out" if leaf == "o_proj" else "in"
            module.register_forward_hook(
                lambda _, inputs, __, kind=kind: seen[kind].append(inputs[0])
            )
    x = draw(7)
    mixer(x, SequenceContext.one_document_per_row(2, 7), Spikes(k=3.0, recorder=recorder))
    assert all(torch.equal(each, seen["in"][0]) for each in seen["in"])
    meet = "shared before_output" in switches
    sites = ["mixer_out"] if meet else ["mixer_out_linear", "mixer_out_sliding_window"]
    assert len(seen["out"]) == len(sites)
    counted = {site: float(sums[:-2].sum()) for site, sums in recorder.tensors().items()}
    widths = {"mixer_in": D} | dict.fromkeys(sites, N * H)
    assert counted == {f"0/{site}": 2 * 7 * width for site, width in widths.items()}


@pytest.mark.parametrize("switches", SWITCHES)
def test_norms_gates_and_weights_may_stay_float32_under_bf16(switches: str) -> None:
    mixer = mixer_of(branch_config(switches)).bfloat16()
    for name, module in mixer.named_modules():
        if name.rpartition(".")[2] in ("gate_down", "gate_up", "merge") or name.endswith("norm"):
            module.float()
    x = draw(4).bfloat16().requires_grad_()
    out = mixer(x, SequenceContext.one_document_per_row(2, 4))
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == parameter.dtype
        assert parameter.grad.isfinite().all(), name
