"""Which folder format can hold a model, and the config.json that says so.

The inverse of `source_config`: what a format cannot express is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from models.config import ModelConfig, NeuronKind, SpikingConfig
from models.conversion.config_keys import NOTE_KEY, Format
from models.layer_pattern import FfnKind, MixerKind
from models.mixer_config import FeatureMap, GateKind, RopeType

_ARCHITECTURE = {
    Format.qwen2: "Qwen2ForCausalLM",
    Format.qwen3: "Qwen3ForCausalLM",
    Format.llama: "LlamaForCausalLM",
    Format.mistral: "MistralForCausalLM",
    Format.gla_swa: "GLAswaForCausalLM",
}
_DTYPE_WORD = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


@dataclass(frozen=True, slots=True)
class _Rule:
    """One thing that a format needs of a model."""

    holds: bool
    field: str
    value: Any
    need: str


def choose_format(config: ModelConfig, preferred: Format | None = None) -> Format:
    """The format to export to: the preferred one if it can hold the model, else the first that can.

    Raises:
        ValueError: no format can hold it; with what each one misses.
    """
    order = [Format.gla_swa, Format.qwen2, Format.qwen3, Format.llama, Format.mistral]
    if preferred is not None:
        order.remove(preferred)
        order.insert(0, preferred)
    reasons = []
    for format in order:
        broken = next((rule for rule in _rules(config, format) if not rule.holds), None)
        if broken is None:
            return format
        reasons.append(f"{format.value} needs {broken.need} (model.{broken.field}: {broken.value})")
    raise ValueError(
        f"mixers ({config.layers.describe()}) must fit one export format: " + "; ".join(reasons)
    )


def check_format(config: ModelConfig, format: Format) -> None:
    """Refuse a model that the format cannot express.

    Raises:
        ValueError: naming the field and the formats that can.
    """
    for rule in _rules(config, format):
        if not rule.holds:
            raise ValueError(
                f"model.{rule.field} ({rule.value}) must be {rule.need} in the {format.value} "
                "format. Leave format=auto, or choose another format."
            )


def write_config(
    config: ModelConfig, format: Format, *, dtype: torch.dtype, spiking: SpikingConfig | None = None
) -> dict[str, Any]:
    """The config.json of a model in a format; `read_config` reads it back.

    Raises:
        ValueError: the format cannot express the model.
    """
    check_format(config, format)
    written: dict[str, Any] = {
        "architectures": [_ARCHITECTURE[format]],
        "model_type": format.value,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "use_cache": True,
        "torch_dtype": _DTYPE_WORD[dtype],
    }
    if format is Format.gla_swa:
        written |= _gla_swa_keys(config)
    else:
        written |= _transformer_keys(config, format)
    note: dict[str, Any] = {"pattern": config.layers.describe()}
    if format is Format.gla_swa:
        note["window_includes_self"] = config.window_includes_self
    if spiking is not None and spiking.neuron is not NeuronKind.off:
        note["spiking"] = {"neuron": spiking.neuron.value, "k": spiking.k}
    return {**written, NOTE_KEY: note}


def _kinds(config: ModelConfig) -> set[MixerKind | None]:
    """Mixer kinds in the pattern; None for `_` and parallel branches."""
    return {layer[0] if len(layer) == 1 else None for layer in config.layers.mixers}


def _rules(config: ModelConfig, format: Format) -> list[_Rule]:
    """What the format needs, in the order in which it is reported."""
    kinds = _kinds(config)
    full, window, linear = MixerKind.full, MixerKind.sliding_window, MixerKind.linear
    allowed = {
        Format.qwen2: {full, window},
        Format.qwen3: {full, window},
        Format.llama: {full},
        Format.mistral: {full} if window not in kinds else {window},
        Format.gla_swa: {window, linear},
    }[format]
    letters = " and ".join(sorted(kind.value for kind in allowed))
    dense = set(config.layers.ffns) == {FfnKind.dense}
    is_even = config.head_dim * config.num_attention_heads == config.hidden_size
    rules = [
        _Rule(kinds <= allowed, "mixers", config.mixers, f"only {letters}"),
        _Rule(dense, "ffns", config.ffns, "only d"),
        _Rule(not config.uses_sinks, "sinks.num_tokens", config.sinks.num_tokens, "0"),
        _Rule(config.qk_norm == (format is Format.qwen3), "qk_norm", config.qk_norm,
              str(format is Format.qwen3).lower()),
        *_bias_rules(config, format),
    ]  # fmt: skip
    if format is Format.llama:
        rules.append(_Rule(config.hidden_size % config.num_attention_heads == 0, "hidden_size",
                           config.hidden_size, "a multiple of num_attention_heads"))  # fmt: skip
    if format is Format.gla_swa:
        visible, linear_eps = config.visible_window_tokens, config.linear.norm_eps
        gate, feature_map = config.linear.gate, config.linear.feature_map
        has_default_rope = config.rope.type is RopeType.default
        rules += [
            _Rule(linear in kinds, "mixers", config.mixers, "a pattern with L"),
            _Rule(is_even, "head_dim", config.head_dim, "hidden_size / num_attention_heads"),
            _Rule(has_default_rope, "rope.type", config.rope.type.value, "default"),
            _Rule(gate is GateKind.low_rank, "linear.gate", gate.value, "low_rank"),
            _Rule(feature_map is FeatureMap.relu, "linear.feature_map", feature_map.value, "relu"),
            _Rule(linear_eps == config.rms_norm_eps, "linear.norm_eps", linear_eps, "rms_norm_eps"),
            _Rule(visible is None or visible > 1, "window_tokens", visible, "2 or more keys"),
        ]  # fmt: skip
    return rules


def _bias_rules(config: ModelConfig, format: Format) -> list[_Rule]:
    if format in (Format.qwen2, Format.gla_swa, Format.mistral):
        needed = {"qkv_bias": format is not Format.mistral, "output_bias": False, "ffn_bias": False}
    else:
        needed = {"output_bias": config.qkv_bias}
        if format is Format.qwen3:
            needed["ffn_bias"] = False
    return [
        _Rule(getattr(config, name) is value, name, getattr(config, name), str(value).lower())
        for name, value in needed.items()
    ]


def _transformer_keys(config: ModelConfig, format: Format) -> dict[str, Any]:
    """Keys of the four Transformer formats; both spellings of rotary scaling."""
    keys: dict[str, Any] = {
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        **_rope_keys(config),
    }
    window = config.visible_window_tokens
    sliding = [layer == (MixerKind.sliding_window,) for layer in config.layers.mixers]
    if format is Format.mistral:
        keys["sliding_window"] = window if any(sliding) else None
    if format in (Format.qwen2, Format.qwen3):
        keys["use_sliding_window"] = any(sliding)
        keys["sliding_window"] = window if any(sliding) else None
        keys["max_window_layers"] = sliding.index(True) if any(sliding) else len(sliding)
        keys["layer_types"] = [
            "sliding_attention" if here else "full_attention" for here in sliding
        ]
    if format in (Format.qwen3, Format.llama):
        keys["attention_bias"] = config.qkv_bias
    if format is Format.llama:
        keys["mlp_bias"] = config.ffn_bias
        keys["pretraining_tp"] = 1
    return keys


def _rope_keys(config: ModelConfig) -> dict[str, Any]:
    """Spellings of transformers 5 (`rope_parameters`) and before (`rope_theta`, `rope_scaling`)."""
    rope = config.rope
    names = {
        RopeType.default: (),
        RopeType.linear: ("factor",),
        RopeType.llama3: ("factor", "low_freq_factor", "high_freq_factor"),
        RopeType.yarn: (
            "factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim",
            "truncate",
        ),
    }[rope.type]  # fmt: skip
    scaling = {name: getattr(rope, name) for name in names if getattr(rope, name) is not None}
    if rope.type in (RopeType.llama3, RopeType.yarn):
        original = rope.original_max_position_embeddings or config.max_position_embeddings
        scaling["original_max_position_embeddings"] = original
    kind = {"rope_type": rope.type.value}
    return {
        "rope_theta": rope.theta,
        "rope_scaling": {**kind, **scaling} if scaling else None,
        "rope_parameters": {**kind, "rope_theta": rope.theta, **scaling},
    }


def _gla_swa_keys(config: ModelConfig) -> dict[str, Any]:
    """Keys of the public format. Its window counts keys besides the current one."""
    visible = config.visible_window_tokens
    return {
        "attn_layers": [
            index
            for index, layer in enumerate(config.layers.mixers)
            if layer == (MixerKind.sliding_window,)
        ],
        "attn_mode": "chunk",
        "sliding_window": 4096 if visible is None else visible - 1,
        "rope_theta": config.rope.theta,
        "norm_eps": config.rms_norm_eps,
        "hidden_act": "swish",
        "use_short_conv": False,
        "conv_size": 4,
        "elementwise_affine": True,
        "fuse_cross_entropy": True,
        "gate_logit_normalizer": config.linear.gate_logit_normalizer,
        "gate_low_rank_dim": config.linear.gate_low_rank_dim,
    }
