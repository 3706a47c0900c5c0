"""What a model costs by arithmetic: parameters, training FLOPs, visible keys. Builds no module."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from models.config import ModelConfig
from models.layer_pattern import MixerKind, Mixers
from models.layouts import is_new_parameter, parameter_layouts
from models.mixer_config import BranchNorm, BranchProjections

LINEAR_CHUNK_TOKENS = 64
"""Chunk length that the FLOPs of linear attention are counted with."""
LINEAR = frozenset({MixerKind.linear})
# What makes keys, values and states: the rest of a mixer is about its own outputs. The kernel of a
# state has a gradient for queries too.
_READ_BY_TOKENS = {
    MixerKind.full: {"k_proj", "v_proj"},
    MixerKind.sliding_window: {"k_proj", "v_proj"},
    MixerKind.linear: {"q_proj", "k_proj", "v_proj", "gate_down", "gate_up"},
}


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
    layers = _matrices_of_layers(config, config.layers.mixers)
    head = config.vocab_size * config.hidden_size
    return sum(sum(layer.values()) for layer in layers) + head


def _matrices_of_layers(config: ModelConfig, mixers: Sequence[Mixers]) -> list[dict[str, int]]:
    """Entries that multiply each token of a stream, by parameter, layer by layer.

    `mixers` are those of each layer that the stream runs through.
    """
    layers: list[dict[str, int]] = [{} for _ in mixers]
    for name, layout in parameter_layouts(config).items():
        if not name.startswith("blocks.") or len(layout.global_shape) < 2:
            continue
        layer, shape = int(name.split(".")[1]), layout.global_shape
        is_routed = layout.ep_dim is not None
        count = config.moe.top_k * math.prod(shape[1:]) if is_routed else math.prod(shape)
        if _is_passed_by(config, name, mixers[layer]):
            continue
        layers[layer][name] = count * (1 + _is_met_twice(config, name, mixers[layer]))
    return layers


def _is_passed_by(config: ModelConfig, name: str, mixers: Mixers) -> bool:
    """Whether a parameter belongs to none of these mixers, but to others of its layer."""
    every = config.layers.mixers[int(name.split(".")[1])]
    others = [kind for kind in every if kind not in mixers]
    if len(others) == len(every):
        return ".mixer." in name
    return any(f".mixer.{kind.name}." in name for kind in others)


def _is_met_twice(config: ModelConfig, name: str, mixers: Mixers) -> bool:
    """Whether two branches go through one output projection one after the other."""
    are_shared = config.branches.projections is BranchProjections.shared
    meet_later = config.branches.norm is BranchNorm.after_output
    is_output = name.endswith(".mixer.o_proj.weight")
    return len(mixers) > 1 and are_shared and meet_later and is_output


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
    microbatch_tokens: float | None = None,
) -> float:
    """Training FLOPs a token (forward and backward), recomputation and spikes not counted.

    `3 (2 N + sum_F 4 K_F d_q + sum_S 4 K_S d_q + sum_L (2 d d (H_q + H_kv) + 2 C H_q d))` with N
    the matrix parameters, K the mean number of keys a query sees (`mean_visible` and all sinks), d
    the head dim, d_q = H_q d, and C the chunk length of linear attention. With `microbatch_tokens`
    also what sinks take of their own, once for so many tokens.
    """
    return flops_by_part(
        config,
        mean_visible_full,
        mean_visible_window,
        linear_chunk_tokens=linear_chunk_tokens,
        microbatch_tokens=microbatch_tokens,
    ).total


def flops_by_part(
    config: ModelConfig,
    mean_visible_full: float,
    mean_visible_window: float,
    *,
    linear_chunk_tokens: int = LINEAR_CHUNK_TOKENS,
    microbatch_tokens: float | None = None,
) -> FlopsPerToken:
    """The terms of `flops_per_token` where they are spent; a look-up in the embedding is free."""
    num_sinks = config.sinks.num_tokens
    mixers = config.layers.mixers
    flops_of = {
        MixerKind.full: _softmax_flops(config, mean_visible_full + num_sinks),
        MixerKind.sliding_window: _softmax_flops(config, mean_visible_window + num_sinks),
        MixerKind.linear: _linear_flops(config, linear_chunk_tokens),
    }
    products = [3.0 * 2 * sum(each.values()) for each in _matrices_of_layers(config, mixers)]
    softmax, linear = (
        [3.0 * sum(flops_of[kind] for kind in each if (kind in LINEAR) is is_linear)
         for each in mixers]
        for is_linear in (False, True)
    )  # fmt: skip
    if config.uses_sinks and microbatch_tokens is not None:
        for layer, own in enumerate(_sink_pass(config, linear_chunk_tokens)):
            products[layer] += own.products / microbatch_tokens
            softmax[layer] += own.softmax / microbatch_tokens
            linear[layer] += own.linear / microbatch_tokens
    return FlopsPerToken(
        embedding=0.0,
        products=tuple(products),
        softmax=tuple(softmax),
        linear=tuple(linear),
        head=3.0 * 2 * config.vocab_size * config.hidden_size,
    )


def _softmax_flops(config: ModelConfig, num_keys: float) -> float:
    """Of one query and the keys that it sees, forward."""
    return 4 * num_keys * config.num_attention_heads * config.head_dim


def _linear_flops(config: ModelConfig, chunk_tokens: int) -> float:
    """Of one token, forward: reading and writing states, and what it sees of its chunk."""
    states = config.num_attention_heads + config.num_key_value_heads
    inside_chunk = 2 * chunk_tokens * config.num_attention_heads * config.head_dim
    return 2 * config.head_dim**2 * states + inside_chunk


@dataclass(frozen=True, slots=True)
class _LayerFlops:
    products: float
    softmax: float
    linear: float


def _sink_pass(config: ModelConfig, chunk_tokens: int) -> list[_LayerFlops]:
    """FLOPs of all sinks in each layer, once through the model, forward and backward.

    Backward takes only what tokens read: nothing after the last mixer with sinks, and of that one
    not what becomes of the sinks themselves.
    """
    count, mixers = config.sinks.num_tokens, config.sink_mixers
    last = max(layer for layer, each in enumerate(mixers) if each)
    found = []
    for layer, matrices in enumerate(_matrices_of_layers(config, mixers)):
        passes = 3 if layer < last else 1
        read = _read_by_tokens(config, layer) if layer == last else frozenset()
        products = sum(
            2 * entries * (3 if name in read else passes) for name, entries in matrices.items()
        )
        num_softmax = sum(kind not in LINEAR for kind in mixers[layer])
        num_linear = len(mixers[layer]) - num_softmax
        softmax = passes * num_softmax * _softmax_flops(config, count)
        linear = 3 * num_linear * _linear_flops(config, chunk_tokens)
        found.append(_LayerFlops(count * products, count * softmax, count * linear))
    return found


def _read_by_tokens(config: ModelConfig, layer: int) -> frozenset[str]:
    """Matrices of a layer whose sinks tokens read, though nobody reads its outputs for them."""
    mixer, found = f"blocks.{layer}.mixer", set[str]()
    for kind in config.sink_mixers[layer]:
        for home in (mixer, f"{mixer}.{kind.name}"):
            found |= {f"{home}.{name}.weight" for name in _READ_BY_TOKENS[kind]}
    return frozenset(found)


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
