"""Logits, losses and gradients of tiny random models against transformers' implementations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from models.config import ModelConfig
from models.mixer_config import RopeConfig, RopeType
from models.model import Model
from models.rotary import inverse_frequencies
from models.sequence import SequenceContext
from tests.models.tiny import random_tokens
from tests.support.closeness import assert_close

TOKENS = 40
SHAPES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0,
    "original_max_position_embeddings": 16, "beta_fast": 4.0, "beta_slow": 1.0,
}  # fmt: skip


def _qwen2() -> tuple[Any, ModelConfig]:
    theirs = Qwen2Config(
        **SHAPES, num_hidden_layers=2, rope_parameters={"rope_type": "default", "rope_theta": 1e6}
    )
    return Qwen2ForCausalLM(theirs), ModelConfig(
        **SHAPES, head_dim=6, mixers="F F", ffns="d d", qkv_bias=True
    )


def _qwen2_windows() -> tuple[Any, ModelConfig]:
    theirs = Qwen2Config(
        **SHAPES, num_hidden_layers=3, use_sliding_window=True, sliding_window=7,
        max_window_layers=1, tie_word_embeddings=True, rope_parameters=YARN,
    )  # fmt: skip
    rope = RopeConfig(
        type=RopeType.yarn, theta=10_000.0, factor=4.0, original_max_position_embeddings=16,
        beta_fast=4.0, beta_slow=1.0,
    )  # fmt: skip
    return Qwen2ForCausalLM(theirs), ModelConfig(
        **SHAPES, head_dim=6, mixers="F S S", ffns="d*3", qkv_bias=True, window_tokens=7,
        tie_word_embeddings=True, rope=rope,
    )  # fmt: skip


def _qwen3() -> tuple[Any, ModelConfig]:
    theirs = Qwen3Config(
        **SHAPES, num_hidden_layers=2, head_dim=10, tie_word_embeddings=True,
        rope_parameters={"rope_type": "linear", "rope_theta": 5e6, "factor": 2.0},
    )  # fmt: skip
    rope = RopeConfig(type=RopeType.linear, theta=5e6, factor=2.0)
    return Qwen3ForCausalLM(theirs), ModelConfig(
        **SHAPES, head_dim=10, mixers="F F", ffns="d d", qk_norm=True, tie_word_embeddings=True,
        rope=rope,
    )  # fmt: skip


def _llama() -> tuple[Any, ModelConfig]:
    theirs = LlamaConfig(
        **SHAPES, num_hidden_layers=2, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-5,
        rope_parameters=LLAMA3,
    )  # fmt: skip
    rope = RopeConfig(
        type=RopeType.llama3, theta=10_000.0, factor=8.0, original_max_position_embeddings=16
    )
    return LlamaForCausalLM(theirs), ModelConfig(
        **SHAPES, head_dim=6, mixers="F F", ffns="d d", qkv_bias=True, output_bias=True,
        ffn_bias=True, rms_norm_eps=1e-5, rope=rope,
    )  # fmt: skip


def _mistral() -> tuple[Any, ModelConfig]:
    theirs = MistralConfig(
        **SHAPES, num_hidden_layers=2, head_dim=8, sliding_window=9,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )  # fmt: skip
    rope = RopeConfig(theta=10_000.0)
    return MistralForCausalLM(theirs), ModelConfig(
        **SHAPES, head_dim=8, mixers="S S", ffns="d d", window_tokens=9, rope=rope
    )


FAMILIES = {
    "qwen2": _qwen2, "qwen2-windows-yarn-tied": _qwen2_windows, "qwen3-linear": _qwen3,
    "llama-llama3-biases": _llama, "mistral-window": _mistral,
}  # fmt: skip
NAMES = {
    "model.embed_tokens.": "embedding.",
    "model.layers.": "blocks.",
    "model.norm.": "final_norm.",
    "lm_head.": "head.",
    ".self_attn.": ".mixer.",
    ".mlp.": ".ffn.",
    ".input_layernorm.": ".mixer_norm.",
    ".post_attention_layernorm.": ".ffn_norm.",
}


def _our_name(name: str) -> str:
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def _pair(family: str, dtype: torch.dtype) -> tuple[Any, Model]:
    """Their model with random weights (norms and biases too), and ours with a copy."""
    theirs, config = FAMILIES[family]()
    theirs.config._attn_implementation = "sdpa"
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            centre = 1.0 if parameter.ndim == 1 else 0.0
            parameter.normal_(centre, 0.15, generator=generator)
    theirs, ours = theirs.to(dtype).eval(), Model(config).to(dtype)
    copies = {_our_name(name): parameter for name, parameter in theirs.named_parameters()}
    ours.load_state_dict(copies)
    return theirs, ours


def _widen(theirs: nn.Module, config: ModelConfig, *, tables: bool) -> None:
    """Replace their float32 islands: norms always, the position tables (by ours) on request."""
    for module in theirs.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = _float64_norm(module)
        if tables and type(module).__name__.endswith("RotaryEmbedding"):
            module.forward = _float64_tables(config)


def _float64_norm(module: Any) -> Any:
    def forward(x: torch.Tensor) -> torch.Tensor:
        mean = x.square().mean(dim=-1, keepdim=True)
        scaled: torch.Tensor = module.weight * x / (mean + module.variance_epsilon).sqrt()
        return scaled

    return forward


def _float64_tables(config: ModelConfig) -> Any:
    frequencies, scale = inverse_frequencies(config)

    def forward(x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = (position_ids[..., None].double() * frequencies).repeat(1, 1, 2)
        return angles.cos() * scale, angles.sin() * scale

    return forward


def _compare(theirs: Any, ours: Model, *, relative: float, gradients: float) -> None:
    tokens = random_tokens(2, TOKENS)
    sequence = SequenceContext.one_document_per_row(2, TOKENS)
    expected = theirs(input_ids=tokens, use_cache=False).logits
    assert_close(ours(tokens, sequence), expected, relative=relative, name="logits")
    labels = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], dim=1)
    wanted = nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten(), reduction="sum")
    loss = ours(tokens, sequence, labels=labels)
    assert_close(loss, wanted, relative=relative, name="loss")
    wanted.backward()
    loss.backward()
    actual = dict(ours.named_parameters())
    assert set(actual) == {_our_name(name) for name, _ in theirs.named_parameters()}
    for name, parameter in theirs.named_parameters():
        gradient = actual[_our_name(name)].grad
        assert gradient is not None
        assert_close(gradient, parameter.grad, relative=gradients, name=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_float64_equals_transformers_with_the_same_position_tables(family: str) -> None:
    theirs, ours = _pair(family, torch.float64)
    _widen(theirs, ours.config, tables=True)
    _compare(theirs, ours, relative=1e-9, gradients=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_float64_equals_transformers_up_to_its_float32_position_tables(family: str) -> None:
    theirs, ours = _pair(family, torch.float64)
    _widen(theirs, ours.config, tables=False)
    _compare(theirs, ours, relative=1e-6, gradients=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_equals_transformers_untouched(family: str) -> None:
    _compare(*_pair(family, torch.float32), relative=1e-4, gradients=1e-4)
