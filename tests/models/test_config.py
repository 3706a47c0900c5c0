from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from models.config import ModelConfig, SpikingConfig
from models.expert_config import ExpertConfig
from models.mixer_config import (
    GateKind,
    LinearAttentionConfig,
    RopeConfig,
    RopeType,
    SinkConfig,
    SinkInit,
)
from tests.models.tiny import tiny_config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, r"vocab_size \(0\) must be at least 1"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_attention_heads": 3}, "must be a multiple of num_key_value_heads: got 2"),
        ({"head_dim": 7}, r"head_dim \(7\) must be even"),
        ({"ffns": "d*3"}, r"ffns \(d\*3: 3 layers\) must have as many layers.*got 4"),
        ({"window_tokens": None}, r"window_tokens \(None\) must be at least 1 because mixers"),
        ({"window_tokens": 0}, r"window_tokens \(0\)"),
        ({"mixers": "L S F Q"}, "got 'Q'"),
        ({"ffns": "d e d e", "ffn_bias": True}, r"ffn_bias \(true\) must be false with mixture"),
        (
            {"sinks": SinkConfig(num_tokens=4, init=SinkInit.bos)},
            r"sinks\.init \(bos\) must come with bos_token_id",
        ),
    ],
)
def test_an_impossible_model_is_refused_with_the_reason(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0.0}, "must be above 0"),
        ({"k_start": -1.0}, r"k_start \(-1.0\) must be above 0"),
        ({"k_start": 6.0}, r"k_start \(6.0\) must come with anneal_steps"),
        ({"k": float("nan")}, "must be above 0"),
        ({"start_step": -1}, r"start_step \(-1\) must be at least 0"),
        ({"statistics_tokens": 0}, r"statistics_tokens \(0\) must be at least 1"),
        ({"max_count": 0}, r"max_count \(0\) must be at least 1"),
    ],
)
def test_impossible_spiking_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpikingConfig(**changes)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LinearAttentionConfig(gate_logit_normalizer=-16), "must be above 0: decays would"),
        (lambda: LinearAttentionConfig(gate_logit_normalizer=0), "must be above 0"),
        (lambda: LinearAttentionConfig(gate_low_rank_dim=0), "must be at least 1"),
        (lambda: LinearAttentionConfig(norm_eps=0), "must be above 0"),
        (
            lambda: LinearAttentionConfig(gate=GateKind.key_tied),
            r"linear\.gate \(key_tied\) must come with linear\.feature_map sigmoid.*got relu",
        ),
        (lambda: LinearAttentionConfig(gate_offset=1.0), r"gate_offset \(1.0\) has no effect"),
        (lambda: LinearAttentionConfig(gate_floor=0.1), r"gate_floor \(0.1\) has no effect"),
        (lambda: LinearAttentionConfig(gate_floor=1.0), r"gate_floor \(1.0\) must be at least 0"),
        (lambda: SinkConfig(num_tokens=-1), r"sinks\.num_tokens \(-1\) must be at least 0"),
        (lambda: ExpertConfig(num_experts=0), r"moe\.num_experts \(0\) must be at least 1"),
        (lambda: ExpertConfig(num_shared_experts=-1), r"moe\.num_shared_experts \(-1\)"),
        (
            lambda: ExpertConfig(num_experts=4, top_k=5),
            r"moe\.top_k \(5\) must be between 1 and moe\.num_experts: got 4",
        ),
        (lambda: ExpertConfig(top_k=0), r"moe\.top_k \(0\)"),
        (lambda: ExpertConfig(renormalise=True), "give.* the router no gradient"),
        (lambda: ExpertConfig(intermediate_size=0), r"moe\.intermediate_size \(0\)"),
        (lambda: ExpertConfig(balance_coefficient=-1), r"moe\.balance_coefficient \(-1\)"),
        (lambda: ExpertConfig(z_loss_coefficient=float("nan")), r"moe\.z_loss_coefficient"),
        (lambda: ExpertConfig(capacity_factor=0), r"moe\.capacity_factor \(0\) must be above 0"),
        (lambda: RopeConfig(theta=-1), r"rope\.theta \(-1\) must be above 0"),
        (lambda: RopeConfig(type=RopeType.linear, factor=0.5), r"rope\.factor \(0.5\) must be at"),
        (lambda: RopeConfig(factor=4), r"rope\.factor \(4\) has no effect with rope\.type default"),
        (lambda: RopeConfig(type=RopeType.linear, factor=2, beta_fast=9), "Set rope.type to yarn,"),
        (lambda: tiny_config(rms_norm_eps=-1), r"rms_norm_eps \(-1\) must be above 0"),
        (lambda: tiny_config(initializer_range=-1), "initializer_range .* must be at least 0"),
    ],
)
def test_numbers_that_would_compute_something_else_are_refused(
    build: Callable[[], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_a_model_without_windows_needs_no_window() -> None:
    assert tiny_config(mixers="L F L F", window_tokens=None).visible_window_tokens is None


def test_the_4097_key_convention_is_one_switch() -> None:
    assert tiny_config(window_tokens=4096).visible_window_tokens == 4096
    assert tiny_config(window_tokens=4096, window_includes_self=False).visible_window_tokens == 4097


@pytest.mark.parametrize(
    ("mixers", "expected"),
    [("F*4", True), ("F S F S", True), ("L S F F", False), ("F _ F F", False)],
)
def test_plain_transformers_have_only_softmax_mixers(mixers: str, expected: bool) -> None:
    assert tiny_config(mixers=mixers).is_plain_transformer is expected


def test_an_unknown_key_is_refused_by_name() -> None:
    adapter = TypeAdapter(ModelConfig)
    values = {
        "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1,
        "num_key_value_heads": 1, "head_dim": 8, "mixers": "F", "ffns": "d",
    }  # fmt: skip
    assert adapter.validate_python(values).num_hidden_layers == 1
    with pytest.raises(ValidationError, match="hidden_dim"):
        adapter.validate_python(values | {"hidden_dim": 3})
