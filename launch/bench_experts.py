"""Rows of `launch.bench` about mixtures of experts: their products, and what they send."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from launch.bench_device_suites import matrix_rate
from launch.bench_layouts import RankJob, measure
from launch.bench_models import build
from launch.bench_ranks import on_ranks
from launch.bench_rows import Row, Setting, compare, median_seconds
from models.config import ModelConfig
from models.expert_config import Balance, ExpertConfig
from models.feed_forward import SwiGLU
from models.grouped_linear import Groups, grouped_linear
from models.mixture_of_experts import MixtureOfExperts
from parallel.config import ParallelConfig

logger = logging.getLogger(__name__)

DENSE_GOAL = 1.25
"""Experts may take this much longer than the dense layer of equal active FLOPs on a processor."""
NUM_RANKS = 2
LAYOUTS = {"ep 2": ParallelConfig(ep=2), "dp 2 without ep": ParallelConfig()}
EXPERTS = ExpertConfig(num_experts=16, num_shared_experts=1, top_k=1, balance=Balance.row)
"""The experts of SpikingBrain-76B, at the sizes of the benched model."""


def moe(setting: Setting) -> Iterator[Row]:
    """Experts against the dense layer of equal active FLOPs, and their bytes under ep 2."""
    for name, experts in (
        ("16 experts, top 1, 1 shared", EXPERTS),
        ("16 experts, top 1", replace(EXPERTS, num_shared_experts=0)),
        ("16 experts, top 2", replace(EXPERTS, num_shared_experts=0, top_k=2)),
    ):
        yield layer_row(name, experts, setting)
    if setting.device.type != "cpu":
        yield from grouped_rows(setting)
    ranks = setting.backend.num_devices() if setting.device.type != "cpu" else NUM_RANKS
    if ranks < NUM_RANKS:
        logger.warning("left out, %d devices are fewer than %d ranks: ep 2", ranks, NUM_RANKS)
        return
    setting = replace(setting, model=with_experts(setting.model))
    yield from on_ranks(measure, RankJob(setting, LAYOUTS, torch.get_num_threads()), NUM_RANKS)


def layer_row(name: str, experts: ExpertConfig, setting: Setting) -> Row:
    """One feed-forward layer, forward and backward, routed by a random router without limit."""
    length = setting.short_tokens
    active = experts.top_k + experts.num_shared_experts
    ours = _layer(setting, "e", experts, setting.model.intermediate_size)
    dense = _layer(setting, "d", experts, active * setting.model.intermediate_size)
    assert isinstance(ours, MixtureOfExperts)
    assert isinstance(dense, SwiGLU)
    x = _random(setting, 1, length, setting.model.hidden_size).requires_grad_()
    positions = torch.arange(length, device=setting.device)[None]
    grad = torch.ones_like(x)
    return compare(
        f"{name} vs dense of equal active FLOPs, fwd+bwd, {length}",
        lambda: torch.autograd.backward(ours(x, positions), grad),
        lambda: torch.autograd.backward(dense(x), grad),
        setting,
        goal=DENSE_GOAL if setting.device.type == "cpu" else None,
        unit="ms",
    )


def grouped_rows(setting: Setting) -> Iterator[Row]:
    """The grouped product of unequal groups: beside the matrix ceiling, a loop, one dense one."""
    model, count = setting.model, EXPERTS.num_experts
    hidden, inner, length = model.hidden_size, model.intermediate_size, setting.short_tokens
    weight = _random(setting, count, inner, hidden)
    rows = _random(setting, length, hidden)
    generator = torch.Generator().manual_seed(3)
    chosen = torch.multinomial(torch.rand(count, generator=generator), length, True)
    counts = torch.bincount(chosen, minlength=count)
    groups = Groups(counts.to(setting.device))
    sizes = counts.tolist()

    def grouped() -> Tensor:
        return grouped_linear(rows, weight, groups)

    def loop() -> list[Tensor]:
        pairs = zip(torch.split(rows, sizes), weight, strict=True)
        return [torch.mm(part, matrix.t()) for part, matrix in pairs]

    flops = 2 * length * hidden * inner
    rate, ceiling = flops / median_seconds(grouped, setting), matrix_rate(setting)
    name = f"grouped product of {length} rows, {count} experts"
    yield Row(f"{name}: of the ceiling", rate / 1e12, ceiling / 1e12, rate / ceiling, "TFLOP/s")
    yield compare(f"{name} vs a loop", grouped, loop, setting, unit="ms")
    yield compare(
        f"{name} vs one matrix", grouped, lambda: rows @ weight[0].t(), setting, unit="ms"
    )


def with_experts(model: ModelConfig) -> ModelConfig:
    """The model with experts in every other layer, small enough for two processes."""
    ffns = " ".join("de"[layer % 2] for layer in range(model.num_hidden_layers))
    inner = max(16, model.intermediate_size // 4)
    return replace(model, ffns=ffns, moe=replace(EXPERTS, intermediate_size=inner))


def _layer(setting: Setting, kind: str, experts: ExpertConfig, inner: int) -> nn.Module:
    """The feed-forward layer of one block, with seeded weights."""
    experts = replace(experts, intermediate_size=inner)
    sizes = replace(
        setting.model, mixers="_", ffns=kind, vocab_size=1, intermediate_size=inner, moe=experts
    )
    layer: nn.Module = build(replace(setting, model=sizes)).blocks[0].ffn
    return layer


def _random(setting: Setting, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(*shape, generator=generator).to(setting.device, setting.dtype)
