"""What a source's config.json says, as a `ModelConfig`; what we would not honour is refused.

Every key is in one of four groups: read here, allowed with one value only, harmless (listed by
name), or refused by name. Defaults for absent keys are those of transformers 5.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig
from models.conversion.config_keys import NOTE_KEY, ConfigKeys, Format
from models.conversion.own_format import read_own
from models.layer_pattern import compress
from models.mixer_config import SCALING_KEYS, LinearAttentionConfig, RopeConfig, RopeType

logger = logging.getLogger(__name__)


ONLY_VALUE: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0, None),
    "pretraining_tp": (1, None),
    "partial_rotary_factor": (1, None),
    "chunk_size_feed_forward": (0, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "use_mrope": (False, None),
    "use_short_conv": (False, None),
    "elementwise_affine": (True, None),
    "enable_spike": (False, None),
}
"""Keys whose other values would change what is computed."""

_REQUIRED_ROPE_KEYS = {
    RopeType.linear: ("factor",),
    RopeType.llama3: ("factor", "low_freq_factor", "high_freq_factor"),
}


def read_format(raw: Mapping[str, Any]) -> Format:
    """The format that `model_type` names.

    Raises:
        ValueError: another model_type.
    """
    known = [format.value for format in Format]
    if raw.get("model_type") not in known:
        raise ValueError(
            f"config.json model_type ({raw.get('model_type')}) must be one of {', '.join(known)}."
        )
    return Format(raw["model_type"])


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Read a config.json of any supported format.

    Raises:
        ValueError: a key or value that we would not honour, or a missing size, by name.
    """
    format = read_format(raw)
    if format is Format.synfire:
        return read_own(raw)
    keys = ConfigKeys(raw, format)
    for name, allowed in ONLY_VALUE.items():
        keys.only(name, allowed)
    keys.only("hidden_act", ("silu", "swish"))
    layers = keys.positive("num_hidden_layers")
    heads = keys.positive("num_attention_heads")
    hidden = keys.positive("hidden_size")
    eps = float(keys.take("norm_eps" if format is Format.gla_swa else "rms_norm_eps", 1e-6))
    mixers, window = _mixers(keys, layers)
    includes_self = _window_includes_self(keys)
    if window is not None and format is Format.gla_swa and includes_self:
        window += 1
    qkv_bias, output_bias, ffn_bias = _biases(keys)
    config = ModelConfig(
        vocab_size=keys.positive("vocab_size"),
        hidden_size=hidden,
        intermediate_size=keys.positive("intermediate_size"),
        num_attention_heads=heads,
        num_key_value_heads=_key_value_heads(keys, heads),
        head_dim=_head_dim(keys, hidden, heads),
        mixers=mixers,
        ffns=f"d*{layers}",
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        ffn_bias=ffn_bias,
        qk_norm=format is Format.qwen3,
        tie_word_embeddings=bool(keys.take("tie_word_embeddings", False)),
        rms_norm_eps=eps,
        initializer_range=float(keys.take("initializer_range", 0.02)),
        max_position_embeddings=int(keys.take("max_position_embeddings", _MAX_POSITIONS[format])),
        window_tokens=window,
        window_includes_self=includes_self,
        rope=_rope(keys),
        linear=LinearAttentionConfig(
            gate_low_rank_dim=int(keys.take("gate_low_rank_dim", 16)),
            gate_logit_normalizer=float(keys.take("gate_logit_normalizer", 16)),
            norm_eps=eps,
        ),
        bos_token_id=_token_id(keys, "bos_token_id"),
        eos_token_id=_token_id(keys, "eos_token_id"),
    )
    keys.refuse_the_rest()
    return config


_MAX_POSITIONS = {
    Format.qwen2: 32_768,
    Format.qwen3: 32_768,
    Format.llama: 2_048,
    Format.mistral: 131_072,
    Format.gla_swa: 131_072,
}


def _key_value_heads(keys: ConfigKeys, heads: int) -> int:
    """Absent only in old Llama configs, null anywhere: as many as query heads."""
    if not keys.has("num_key_value_heads") and keys.format is not Format.llama:
        return keys.positive("num_key_value_heads")
    return int(keys.take("num_key_value_heads", heads))


def _head_dim(keys: ConfigKeys, hidden: int, heads: int) -> int:
    if keys.format is Format.qwen3:
        return int(keys.take("head_dim", 128))
    value = int(keys.take("head_dim", hidden // heads))
    if keys.format is Format.gla_swa and value * heads != hidden:
        keys.refuse("head_dim", f"must be hidden_size / num_attention_heads ({hidden // heads})")
    return value


def _biases(keys: ConfigKeys) -> tuple[bool, bool, bool]:
    """Biases of q, k, v; of o; of the FFN. Some formats fix them."""
    if keys.format in (Format.qwen2, Format.gla_swa, Format.mistral):
        has_bias = keys.format is not Format.mistral
        keys.only("attention_bias", (has_bias, None))
        keys.only("mlp_bias", (False, None))
        return has_bias, False, False
    attention = bool(keys.take("attention_bias", False))
    ffn = bool(keys.take("mlp_bias", False)) if keys.format is Format.llama else False
    return attention, attention, ffn


def _mixers(keys: ConfigKeys, layers: int) -> tuple[str, int | None]:
    """The pattern and its window; in transformers w means w visible keys, self included."""
    if keys.format is Format.gla_swa:
        softmax = set(keys.take("attn_layers", list(range(1, layers, 2))))
        if any(not isinstance(index, int) or not 0 <= index < layers for index in softmax):
            keys.refuse("attn_layers", f"must list layers 0 to {layers - 1}")
        letters = ["S" if index in softmax else "L" for index in range(layers)]
        window = keys.take("sliding_window", 4096)
        return compress(letters), (window if softmax else None)
    if keys.format is Format.llama:
        return f"F*{layers}", None
    if keys.format is Format.mistral:
        window = keys.take("sliding_window", None if keys.has("sliding_window") else 4096)
        return (f"F*{layers}" if window is None else f"S*{layers}"), window
    return _qwen_mixers(keys, layers)


def _window_includes_self(keys: ConfigKeys) -> bool:
    """The public format counts earlier keys only; our exports note what the model itself said."""
    if keys.format is not Format.gla_swa:
        return True
    note = keys.take(NOTE_KEY, {})
    return isinstance(note, Mapping) and note.get("window_includes_self") is True


def _qwen_mixers(keys: ConfigKeys, layers: int) -> tuple[str, int | None]:
    """Qwen: `layer_types`, or windows from `max_window_layers` on when switched on."""
    window = keys.take("sliding_window", None if keys.has("sliding_window") else 4096)
    first = keys.take("max_window_layers", 28)
    if not keys.take("use_sliding_window", False):
        window = None
    types = keys.take("layer_types")
    if types is None:
        sliding = [window is not None and index >= first for index in range(layers)]
    else:
        if len(types) != layers or set(types) - {"full_attention", "sliding_attention"}:
            keys.refuse(
                "layer_types", f"must be {layers} entries of full_attention or sliding_attention"
            )
        sliding = [kind == "sliding_attention" for kind in types]
        if any(sliding) and window is None:
            keys.refuse("layer_types", "must not have sliding_attention without use_sliding_window")
    pattern = compress(["S" if here else "F" for here in sliding])
    return pattern, (window if any(sliding) else None)


def _rope(keys: ConfigKeys) -> RopeConfig:
    """Both spellings: `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling`."""
    theta = keys.take("rope_theta", 1e6 if keys.format is Format.gla_swa else 10_000.0)
    scaling = keys.take("rope_scaling")
    name = "rope_scaling" if scaling else "rope_parameters"
    parameters = scaling or keys.take("rope_parameters", {})
    keys.take("rope_parameters")
    if any(isinstance(value, Mapping) for value in parameters.values()):
        keys.refuse(name, "must be one set of numbers for all layers")
    inner = ConfigKeys(parameters, keys.format, f"{name}.")
    word = inner.take("rope_type", inner.take("type", "default"))
    inner.take("type")
    if word not in RopeType.__members__:
        inner.refuse(
            "rope_type" if inner.has("rope_type") else "type",
            f"must be one of {', '.join(RopeType.__members__)}",
        )
    kind = RopeType[word]
    if keys.format is Format.gla_swa and kind is not RopeType.default:
        keys.refuse(name, "must be absent in this format")
    inner.only("partial_rotary_factor", (1, None))
    values = {key: inner.take(key) for key in SCALING_KEYS[kind]}
    _complete_rope(kind, values, keys, name)
    theta = float(inner.take("rope_theta", theta))
    inner.refuse_the_rest()
    numbers = {key: value for key, value in values.items() if value is not None}
    return RopeConfig(theta=theta, type=kind, **numbers)


def _complete_rope(kind: RopeType, values: dict[str, Any], keys: ConfigKeys, name: str) -> None:
    """Fill what transformers derives from other keys."""
    for key in _REQUIRED_ROPE_KEYS.get(kind, ()):
        if values[key] is None:
            raise ValueError(f"config.json {name}.{key} must be set for rope type {kind.value}.")
    if "original_max_position_embeddings" not in values:
        return
    longest = keys.take("max_position_embeddings", _MAX_POSITIONS[keys.format])
    original = values["original_max_position_embeddings"]
    original = keys.take("original_max_position_embeddings", original or longest)
    values["original_max_position_embeddings"] = original
    if values["factor"] is None:
        values["factor"] = longest / original


def _token_id(keys: ConfigKeys, name: str) -> int | None:
    value = keys.take(name)
    if isinstance(value, list):
        logger.warning("config.json %s (%s) has several ids: the first one is kept.", name, value)
        return int(value[0]) if value else None
    return value if value is None else int(value)
