"""Rows of `launch.bench` against the device itself: its copy, its matrix product, its parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from launch.bench_models import build, row_flops
from launch.bench_rows import Row, Setting, Work, compare, median_seconds
from launch.bench_suites import mixer_work
from models.block import Block
from models.layer_pattern import MixerKind
from models.sequence import SequenceContext
from models.spiking.neurons import Spikes
from models.spiking.recorder import SpikeRecorder

NEURON_TOKENS = 8192
COPY_BYTES = 1 << 28
SHARE_OF_COPY = 1.25
"""An encoding at 80 % of the copy's bandwidth takes this much longer."""


def ceilings(setting: Setting) -> Iterator[Row]:
    """What the device does at best: bytes a second of a copy, FLOP/s of a matrix product."""
    source = _random(setting, COPY_BYTES // setting.dtype.itemsize)
    target = torch.empty_like(source)
    rate = 2 * COPY_BYTES / median_seconds(lambda: target.copy_(source), setting) / 1e9
    yield Row("copy of 256 MiB, bytes read and written", rate, None, None, "GB/s")
    achieved = matrix_rate(setting)
    peak = setting.backend.peak_flops(setting.dtype)
    yield Row(
        "matrix product of random data (peak beside)",
        achieved / 1e12,
        None if peak is None else peak / 1e12,
        None if peak is None else achieved / peak,
        "TFLOP/s",
    )


def matrix_rate(setting: Setting) -> float:
    """FLOP/s of a square matrix product, large enough for the device."""
    size = 2048 if setting.device.type == "cpu" else 8192
    a, b = _random(setting, size, size), _random(setting, size, size)
    return 2 * size**3 / median_seconds(lambda: a @ b, setting)


def neuron(setting: Setting) -> Iterator[Row]:
    """Spike encoding of the model's two widths beside a copy of the same activations."""
    layer = build(_one_layer(setting, MixerKind.linear)).blocks[0]
    assert isinstance(layer, Block)
    encode = layer.ffn.in_neuron
    assert encode is not None
    for channels in (setting.model.hidden_size, setting.model.intermediate_size):
        yield from _neuron_rows(setting, encode, channels)


def _neuron_rows(setting: Setting, encode: nn.Module, channels: int) -> Iterator[Row]:
    x = _random(setting, NEURON_TOKENS, channels)
    leaf, target = x.clone().requires_grad_(), torch.empty_like(x)
    plain = Spikes(k=3.0)
    recorded = Spikes(k=3.0, recorder=SpikeRecorder(256))
    forms: dict[str, Work] = {
        "encode": lambda: encode(x, plain, "0/ffn_in"),
        "encode with statistics": lambda: encode(x, recorded, "0/ffn_in"),
        "encode and backward": lambda: encode(leaf, plain, "0/ffn_in").backward(x),
    }
    for name, work in forms.items():
        yield compare(
            f"{name} vs copy, {NEURON_TOKENS} x {channels}",
            work,
            lambda: target.copy_(x),
            setting,
            goal=None if setting.device.type == "cpu" else SHARE_OF_COPY,
            unit="ms",
        )


def block(setting: Setting) -> Iterator[Row]:
    """One block of each kind, forward and backward, beside the matrix ceiling and by part."""
    ceiling = matrix_rate(setting)
    kinds = dict.fromkeys(kind for mixers in setting.model.layers.mixers for kind in mixers)
    for kind in kinds:
        one = _one_layer(setting, kind)
        for length in (setting.short_tokens, setting.long_tokens):
            yield from _block_rows(one, kind, length, ceiling)


def _block_rows(setting: Setting, kind: MixerKind, length: int, ceiling: float) -> Iterator[Row]:
    layer = build(setting).blocks[0]
    assert isinstance(layer, Block)
    sequence = SequenceContext.one_document_per_row(1, length, device=setting.device)
    x = _random(setting, 1, length, setting.model.hidden_size).requires_grad_()
    whole = median_seconds(_backward(layer, x, sequence), setting)
    floor = row_flops(setting.model, length) / ceiling
    name = f"{kind.value} block, {length}"
    yield Row(f"{name} vs matrix ceiling", 1e3 * whole, 1e3 * floor, whole / floor, "ms")
    kernel = "linear" if kind is MixerKind.linear else "window"
    unlimited = setting if kind is not MixerKind.full else _without_window(setting)
    mixer = median_seconds(_backward(layer.mixer, x, sequence), setting)
    attention = median_seconds(mixer_work(kernel, length, unlimited), setting)
    parts = {
        "attention kernel": attention,
        "projections, gate, positions": mixer - attention,
        "feed-forward": median_seconds(_backward(layer.ffn, x), setting),
        "two norms": 2 * median_seconds(_backward(layer.ffn_norm, x), setting),
    }
    for part, seconds in parts.items():
        yield Row(f"{name}: {part} of it", 1e3 * seconds, 1e3 * whole, seconds / whole, "ms")


def _backward(module: nn.Module | None, x: Tensor, *arguments: object) -> Work:
    assert module is not None
    grad = torch.ones_like(x)
    return lambda: torch.autograd.backward(module(x, *arguments), grad)


def _one_layer(setting: Setting, kind: MixerKind) -> Setting:
    """The sizes of the setting with one block and next to no vocabulary."""
    model = replace(setting.model, mixers=kind.value, ffns="d", vocab_size=1)
    return replace(setting, model=model)


def _without_window(setting: Setting) -> Setting:
    return replace(setting, model=replace(setting.model, window_tokens=None))


def _random(setting: Setting, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(*shape, generator=generator).to(setting.device, setting.dtype)
