from __future__ import annotations

from typing import Any

import pytest

from models.config import ModelConfig
from models.conversion.config_keys import Format
from models.conversion.source_config import read_config, read_format
from models.layouts import parameter_layouts
from models.mixer_config import RopeType

QWEN2_5_7B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
SPIKINGBRAIN_7B: dict[str, Any] = {
    "architectures": ["GLAswaForCausalLM"],
    "model_type": "gla_swa",
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "attn_layers": list(range(1, 28, 2)),
    "attn_mode": "chunk",
    "sliding_window": 4096,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 131072,
    "norm_eps": 1e-06,
    "hidden_act": "swish",
    "use_short_conv": False,
    "conv_size": 4,
    "elementwise_affine": True,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "fuse_cross_entropy": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 151643,
    "eos_token_id": 151643,
}
SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def small(model_type: str, **keys: Any) -> dict[str, Any]:
    return {"model_type": model_type, **SMALL, **keys}


def parameters(config: ModelConfig) -> int:
    total = 0
    for layout in parameter_layouts(config).values():
        size = 1
        for length in layout.global_shape:
            size *= length
        total += size
    return total


def test_qwen2_5_7b() -> None:
    config = read_config(QWEN2_5_7B)
    assert config.mixers == "F*28"
    assert config.window_tokens is None
    assert (config.head_dim, config.num_key_value_heads) == (128, 4)
    assert (config.qkv_bias, config.output_bias, config.ffn_bias) == (True, False, False)
    assert config.rope.theta == 1e6
    assert config.rope.type is RopeType.default
    assert config.eos_token_id == 151643
    assert len(parameter_layouts(config)) == 339
    assert parameters(config) == 7_615_616_512


def test_spikingbrain_7b_in_the_public_format() -> None:
    config = read_config(SPIKINGBRAIN_7B)
    assert config.mixers == "[L S]*14"
    # The public code shows 4096 earlier keys and the current one.
    assert (config.window_tokens, config.visible_window_tokens) == (4096, 4097)
    assert len(parameter_layouts(config)) == 395
    assert parameters(config) == 7_616_542_976
    assert config.linear.gate_low_rank_dim == 16
    assert config.linear.gate_logit_normalizer == 16.0


def test_layer_pattern_of_the_public_format_is_read_not_assumed() -> None:
    raw = small("gla_swa", attn_layers=[0, 3], sliding_window=8)
    assert read_config(raw).mixers == "S L*2 S"
    del raw["attn_layers"]
    assert read_config(raw).mixers == "[L S]*2"
    with pytest.raises(ValueError, match=r"attn_layers \(\[9\]\) must list layers 0 to 3"):
        read_config(small("gla_swa", attn_layers=[9]))


@pytest.mark.parametrize(
    ("keys", "mixers", "window"),
    [
        ({}, "F*4", None),
        ({"sliding_window": 16}, "F*4", None),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3}, "F*3 S", 16),
        ({"use_sliding_window": True, "max_window_layers": 0}, "S*4", 4096),
        ({"use_sliding_window": True, "sliding_window": 16}, "F*4", None),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, "F*4", None),
        (
            {"use_sliding_window": True, "sliding_window": 16,
             "layer_types": ["full_attention", "sliding_attention"] * 2}, "[F S]*2", 16,
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_windows_of_qwen(
    model_type: str, keys: dict[str, Any], mixers: str, window: int | None
) -> None:
    config = read_config(small(model_type, **keys))
    assert config.layers.describe().startswith(f"mixers {mixers} |")
    assert config.window_tokens == window
    assert config.visible_window_tokens == window


def test_windows_agree_with_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    for keys in ({}, {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3}):
        theirs = transformers.Qwen2Config(**SMALL, **keys)
        letters = {"full_attention": "F", "sliding_attention": "S"}
        pattern = " ".join(letters[kind] for kind in theirs.layer_types)
        ours = read_config(theirs.to_dict())
        assert (
            ours.layers
            == ModelConfig(
                **{**SMALL_SIZES, "mixers": pattern, "ffns": "d*4", "window_tokens": 16}
            ).layers
        )


SMALL_SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip


def test_mistral_windows_every_layer() -> None:
    assert read_config(small("mistral")).window_tokens == 4096
    assert read_config(small("mistral", sliding_window=8)).mixers == "S*4"
    assert read_config(small("mistral", sliding_window=None)).mixers == "F*4"


def test_biases_and_norms_of_each_format() -> None:
    def flags(raw: dict[str, Any]) -> tuple[bool, bool, bool, bool]:
        config = read_config(raw)
        return config.qkv_bias, config.output_bias, config.ffn_bias, config.qk_norm

    assert flags(small("qwen2")) == (True, False, False, False)
    assert flags(small("qwen3")) == (False, False, False, True)
    assert flags(small("qwen3", attention_bias=True)) == (True, True, False, True)
    assert flags(small("llama")) == (False, False, False, False)
    assert flags(small("llama", attention_bias=True)) == (True, True, False, False)
    assert flags(small("llama", mlp_bias=True)) == (False, False, True, False)
    assert flags(small("mistral")) == (False, False, False, False)
    assert flags(small("gla_swa")) == (True, False, False, False)


def test_head_dim_and_key_value_heads() -> None:
    assert read_config(small("qwen2")).head_dim == 8
    assert read_config(small("qwen2", head_dim=12)).head_dim == 12
    assert read_config(small("qwen3")).head_dim == 128
    raw = small("llama")
    del raw["num_key_value_heads"]
    assert read_config(raw).num_key_value_heads == 4
    assert read_config(small("mistral", num_key_value_heads=None)).num_key_value_heads == 4
    raw = small("mistral")
    del raw["num_key_value_heads"]
    with pytest.raises(ValueError, match=r"num_key_value_heads \(None\) must be a whole number"):
        read_config(raw)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 500.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rope_theta": 500.0, "rope_scaling": None},
        {"rope_theta": 500.0, "rope_scaling": {"type": "default"}},
    ],
)
def test_plain_rope_in_both_spellings(rope: dict[str, Any]) -> None:
    found = read_config(small("qwen2", **rope)).rope
    assert (found.type, found.theta) == (RopeType.default, 500.0)
    assert read_config(small("qwen2")).rope.theta == 10_000.0


def test_scaled_rope_in_both_spellings() -> None:
    yarn = {"factor": 4.0, "original_max_position_embeddings": 32}
    old = read_config(small("qwen2", rope_theta=1e6, rope_scaling={"type": "yarn", **yarn}))
    new = read_config(
        small("qwen2", rope_parameters={"rope_type": "yarn", "rope_theta": 1e6, **yarn})
    )
    assert old.rope == new.rope
    assert old.rope.type is RopeType.yarn
    assert (old.rope.factor, old.rope.original_max_position_embeddings) == (4.0, 32)
    linear = read_config(small("llama", rope_scaling={"type": "linear", "factor": 2.0}))
    assert (linear.rope.type, linear.rope.factor) == (RopeType.linear, 2.0)
    # transformers fills the trained length from the config, and YaRN's factor from both.
    raw = small("llama", max_position_embeddings=128, original_max_position_embeddings=32)
    derived = read_config({**raw, "rope_scaling": {"rope_type": "yarn", "factor": None}})
    assert (derived.rope.factor, derived.rope.original_max_position_embeddings) == (4.0, 32)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"model_type": "gpt2"}, r"model_type \(gpt2\) must be one of qwen2, qwen3, llama"),
        ({}, r"model_type \(None\) must be one of"),
        (small("qwen2", hidden_act="gelu"), r"hidden_act \(gelu\) must be silu or swish"),
        (small("qwen2", attention_dropout=0.1), r"attention_dropout \(0.1\) must be 0"),
        (small("qwen2", quantization_config={"bits": 4}), r"honour: quantization_config \("),
        (small("qwen2", num_experts=8), r"honour: num_experts \(8\)"),
        (small("qwen2", use_mrope=True), r"use_mrope \(True\) must be False"),
        (small("qwen2", surprise=1, other=2), r"honour: other \(2\), surprise \(1\)"),
        (small("llama", pretraining_tp=2), r"pretraining_tp \(2\) must be 1"),
        (small("llama", partial_rotary_factor=0.5), r"partial_rotary_factor \(0.5\) must be 1"),
        (small("llama", layer_types=["full_attention"] * 4), r"honour: layer_types"),
        (small("mistral", attention_bias=True), r"attention_bias \(True\) must be False"),
        (small("gla_swa", use_short_conv=True), r"use_short_conv \(True\) must be False"),
        (small("gla_swa", elementwise_affine=False), r"elementwise_affine \(False\) must be True"),
        (small("gla_swa", quant_weight_group_size=128), r"quant_weight_group_size \(128\)"),
        (small("gla_swa", head_dim=16), r"head_dim \(16\) must be hidden_size / num_att"),
        (small("gla_swa", rope_scaling={"type": "linear", "factor": 2.0}), "must be absent"),
        (
            small("qwen2", rope_scaling={"type": "mrope", "mrope_section": [1, 2]}),
            r"rope_scaling.type \(mrope\) must be one of default, linear, llama3, yarn",
        ),
        (
            small("qwen2", rope_scaling={"rope_type": "yarn", "factor": 2.0, "mystery": 1}),
            r"honour: rope_scaling.mystery \(1\)",
        ),
        (
            small("qwen2", rope_parameters={"rope_type": "default", "factor": 2.0}),
            r"honour: rope_parameters.factor \(2.0\)",
        ),
        (
            small("qwen2", rope_parameters={"full_attention": {"rope_type": "default"}}),
            "must be one set of numbers for all layers",
        ),
        (small("llama", rope_scaling={"type": "llama3", "factor": 2.0}), "low_freq_factor must be"),
        (
            small("qwen2", layer_types=["sliding_attention"] * 4),
            "must not have sliding_attention without use_sliding_window",
        ),
        (
            small("qwen2", layer_types=["chunked_attention"] * 4),
            "must be 4 entries of full_attention or sliding_attention",
        ),
        (small("qwen2", layer_types=["full_attention"] * 3), "must be 4 entries"),
        ({**SMALL, "model_type": "qwen2", "vocab_size": None}, r"vocab_size \(None\) must be a"),
        ({**SMALL, "model_type": "qwen2", "hidden_size": True}, r"hidden_size \(True\) must be a"),
    ],
)  # fmt: skip
def test_what_is_not_honoured_is_refused_by_name(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_config(raw)


def test_nulls_and_harmless_keys_pass() -> None:
    raw = small("qwen2", num_experts=None, quantization_config=None, transformers_version="5.0",
                dtype="bfloat16", pad_token_id=0, architectures=["Qwen2ForCausalLM"],
                synfire={"pattern": "F"}, output_attentions=False)  # fmt: skip
    assert read_config(raw) == read_config(small("qwen2"))


def test_first_of_several_end_tokens(caplog: pytest.LogCaptureFixture) -> None:
    assert read_config(small("llama", eos_token_id=[5, 6])).eos_token_id == 5
    assert "several ids" in caplog.text


def test_format_names() -> None:
    assert [read_format({"model_type": format.value}) for format in Format] == list(Format)
