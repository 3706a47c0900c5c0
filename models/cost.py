"""What a model costs by arithmetic: parameters, training FLOPs, visible keys. Builds no module."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from models.config import ModelConfig
from models.layer_pattern import MixerKind
from models.layouts import is_new_parameter, parameter_layouts
from models.mixer_config import BranchNorm, BranchProjections

LINEAR_CHUNK_TOKENS = 64
"""Chunk length that the FLOPs of linear attention are counted with."""


def parameter_count(config: ModelConfig) -> int:
    """All parameters; a tied head is counted once."""
    return sum(
        math.prod(layout.global_shape)
        for layout in parameter_layouts(config).values()
        if not layout.is_state
    )


def active_parameter_count(config: ModelConfig) -> int:
    """Parameters that one token meets: of the routed experts those it visits, all others."""
    idle = config.moe.num_experts - config.moe.top_k
    return parameter_count(config) - sum(
        idle * math.prod(layout.global_shape[1:])
        for layout in parameter_layouts(config).values()
        if layout.ep_dim is not None
    )


def new_parameter_count(config: ModelConfig) -> int:
    """Parameters that conversion adds to a Transformer's: gates, head norms, routers."""
    return sum(
        math.prod(layout.global_shape)
        for name, layout in parameter_layouts(config).items()
        if is_new_parameter(name) and not layout.is_state
    )


def matrix_parameter_count(config: ModelConfig) -> int:
    """Entries of all matrices that multiply each token: with the head, without the embedding.

    Of routed experts those that a token visits; one that does so for two branches counts twice.
    """
    return sum(_matrix_parameters_of_layers(config)) + config.vocab_size * config.hidden_size


def _matrix_parameters_of_layers(config: ModelConfig) -> list[int]:
    counts = [0] * config.num_hidden_layers
    for name, layout in parameter_layouts(config).items():
        if not name.startswith("blocks.") or len(layout.global_shape) < 2:
            continue
        layer, shape = int(name.split(".")[1]), layout.global_shape
        is_routed = layout.ep_dim is not None
        counts[layer] += config.moe.top_k * math.prod(shape[1:]) if is_routed else math.prod(shape)
        if _is_met_twice(config, name):
            counts[layer] += math.prod(shape)
    return counts


def _is_met_twice(config: ModelConfig, name: str) -> bool:
    """Whether two branches go through one output projection one after the other."""
    are_shared = config.branches.projections is BranchProjections.shared
    is_parallel = len(config.layers.mixers[int(name.split(".")[1])]) > 1
    meet_later = config.branches.norm is BranchNorm.after_output
    return is_parallel and are_shared and meet_later and name.endswith(".mixer.o_proj.weight")


@dataclass(frozen=True, slots=True)
class FlopsPerToken:
    """Training FLOPs a token (forward and backward): embedding, each layer, head with loss.

    A layer's are those of its matrices (`products`) and of its attention, which runs on kernels of
    two kinds (`softmax`, `linear`).
    """

    embedding: float
    products: tuple[float, ...]
    softmax: tuple[float, ...]
    linear: tuple[float, ...]
    head: float

    @property
    def layers(self) -> tuple[float, ...]:
        """Of each layer."""
        return tuple(map(sum, zip(self.products, self.softmax, self.linear, strict=True)))

    @property
    def total(self) -> float:
        """Of the whole model."""
        return self.embedding + sum(self.layers) + self.head


def flops_per_token(
    config: ModelConfig,
    mean_visible_full: float,
    mean_visible_window: float,
    *,
    linear_chunk_tokens: int = LINEAR_CHUNK_TOKENS,
) -> float:
    """Training FLOPs a token (forward and backward), recomputation and spikes not counted.

    `3 (2 N + sum_F 4 K_F d_q + sum_S 4 K_S d_q + sum_L (2 d d (H_q + H_kv) + 2 C H_q d))` with N
    the matrix parameters, K the mean number of keys a query sees (`mean_visible`), d the head dim,
    d_q = H_q d, and C the chunk length of linear attention.
    """
    return flops_by_part(
        config, mean_visible_full, mean_visible_window, linear_chunk_tokens=linear_chunk_tokens
    ).total


def flops_by_part(
    config: ModelConfig,
    mean_visible_full: float,
    mean_visible_window: float,
    *,
    linear_chunk_tokens: int = LINEAR_CHUNK_TOKENS,
) -> FlopsPerToken:
    """The terms of `flops_per_token` where they are spent; a look-up in the embedding is free."""
    queries = config.num_attention_heads * config.head_dim
    states = config.num_attention_heads + config.num_key_value_heads
    inside_chunk = 2 * linear_chunk_tokens * queries
    of_softmax = {
        MixerKind.full: 4 * mean_visible_full * queries,
        MixerKind.sliding_window: 4 * mean_visible_window * queries,
    }
    of_linear = {MixerKind.linear: 2 * config.head_dim**2 * states + inside_chunk}
    softmax, linear = (
        tuple(3.0 * sum(flops.get(kind, 0.0) for kind in each) for each in config.layers.mixers)
        for flops in (of_softmax, of_linear)
    )
    return FlopsPerToken(
        embedding=0.0,
        products=tuple(3.0 * 2 * count for count in _matrix_parameters_of_layers(config)),
        softmax=softmax,
        linear=linear,
        head=3.0 * 2 * config.vocab_size * config.hidden_size,
    )


def expert_flops_per_token(config: ModelConfig) -> tuple[float, float]:
    """FLOPs a token, forward alone, of one layer's routed and of its shared experts."""
    moe = config.moe
    each = 2.0 * 3 * config.hidden_size * config.expert_intermediate_size
    return moe.top_k * each, moe.num_shared_experts * each


def mean_visible(lengths: Iterable[int], window_tokens: int | None = None) -> float:
    """Keys that a causal query sees, itself included, averaged over all tokens of documents.

    Args:
        lengths: tokens of each document.
        window_tokens: keys of a window, itself included; None is all earlier ones.
    """
    tokens = keys = 0
    for length in lengths:
        full = length if window_tokens is None else min(length, window_tokens)
        tokens += length
        keys += full * (full + 1) // 2 + (length - full) * full
    return keys / tokens if tokens else 0.0
