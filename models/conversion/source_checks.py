"""Whether a source folder is whole and whether a target model can be made from it."""

from __future__ import annotations

import logging

from models.config import ModelConfig
from models.conversion.config_keys import Format
from models.conversion.huggingface import TensorSource
from models.conversion.weight_map import IGNORED_SOURCE, theirs
from models.layer_pattern import FfnKind, MixerKind, Mixers
from models.layouts import parameter_layouts, refuse_experts
from models.mixer_config import FeatureMap, GateKind

logger = logging.getLogger(__name__)

_SAME = (
    "num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "qkv_bias", "output_bias", "ffn_bias", "qk_norm",
)  # fmt: skip
_NOTED = ("rms_norm_eps", "rope")


def check_target(source: ModelConfig, target: ModelConfig) -> None:
    """Refuse a target whose sizes or layers the source cannot fill.

    Raises:
        ValueError: naming the key and both values.
    """
    for key in _SAME:
        ours, theirs_value = getattr(target, key), getattr(source, key)
        if ours != theirs_value:
            raise ValueError(
                f"model.{key} ({ours}) must equal the source's: got {theirs_value}. "
                "Choose the model= that was made for this source, or change only mixers."
            )
    if target.tie_word_embeddings and not source.tie_word_embeddings:
        raise ValueError(
            "model.tie_word_embeddings (true) must be false: the source has its own output head."
        )
    _check_options(source, target)
    pairs = list(zip(source.layers.mixers, target.layers.mixers, strict=True))
    for index, (before, after) in enumerate(pairs):
        is_reused = before != (MixerKind.linear,) and len(before) < 2
        if not is_reused and after != before and after:
            raise ValueError(
                f"mixers ({target.mixers}) layer {index} must stay {_symbol(before)} as in the "
                f"source: got {_symbol(after)}. Its gates and norms have no place in another mixer."
            )
    _refuse_unconverted(source, target)
    for index, (old, new) in enumerate(zip(source.layers.ffns, target.layers.ffns, strict=True)):
        if old is FfnKind.mixture_of_experts and new is not old:
            raise ValueError(
                f"ffns ({target.ffns}) layer {index} must stay e as in the source: got {new.value}."
            )
    if source.layers.ffns != target.layers.ffns:
        refuse_experts(target, "converted to")


def _check_options(source: ModelConfig, target: ModelConfig) -> None:
    """Refuse other options of what the source has."""
    layers = source.layers
    for key, is_read, what in (
        ("linear", any(MixerKind.linear in mixers for mixers in layers.mixers), "L layers"),
        ("branches", any(len(mixers) > 1 for mixers in layers.mixers), "X+Y layers"),
        ("moe", FfnKind.mixture_of_experts in layers.ffns, "e layers"),
        ("sinks", source.uses_sinks, "sink tokens"),
    ):
        ours, theirs_value = getattr(target, key), getattr(source, key)
        if is_read and ours != theirs_value:
            raise ValueError(
                f"model.{key} ({ours}) must equal the source's, which has {what}: got "
                f"{theirs_value}."
            )


def _symbol(mixers: Mixers) -> str:
    return "+".join(kind.value for kind in mixers) or "_"


def _refuse_unconverted(source: ModelConfig, target: ModelConfig) -> None:
    """Refuse new mixers and sinks that models here have, but that no conversion makes yet."""
    if target.uses_sinks and not source.uses_sinks:
        raise ValueError(
            f"model.sinks.num_tokens ({target.sinks.num_tokens}) must be 0 in a conversion. Train "
            "such a model from its start."
        )
    for before, after in zip(source.layers.mixers, target.layers.mixers, strict=True):
        if len(after) > 1 and after != before:
            raise ValueError(
                f"mixers ({target.mixers}) must have one mixer a layer in a conversion: got "
                f"{_symbol(after)}. Use F, S, L or _."
            )
    if source.linear == target.linear and not any(becomes_linear(source, target)):
        return
    for name, default in (("gate", GateKind.low_rank), ("feature_map", FeatureMap.relu)):
        value = getattr(target.linear, name)
        if value is not default:
            raise ValueError(
                f"model.linear.{name} ({value.value}) must be {default.value} in a conversion. "
                "Train such a model from its start."
            )


def warn_of_changes(source: ModelConfig, target: ModelConfig) -> None:
    """Name settings that differ and that no shape would show."""
    window = (MixerKind.sliding_window,)
    pairs = zip(source.layers.mixers, target.layers.mixers, strict=True)
    keeps_window = any(before == after == window for before, after in pairs)
    for key in (*_NOTED, "visible_window_tokens") if keeps_window else _NOTED:
        if getattr(source, key) != getattr(target, key):
            logger.warning(
                "model.%s (%s) is not the source's (%s): step 0 changes by it.",
                key, getattr(target, key), getattr(source, key),
            )  # fmt: skip


def check_source(source: TensorSource, config: ModelConfig, format: Format) -> None:
    """Refuse a folder whose tensors are not exactly those that its config describes.

    Raises:
        ValueError: naming the first missing, unknown or misshapen tensor.
    """
    names = set(source.names())
    expected = {}
    for name, layout in parameter_layouts(config).items():
        known = theirs(name, format)
        assert known is not None, f"{format.value} has no name for {name}"
        expected[known] = layout.global_shape
    missing = [name for name in expected if name not in names]
    if missing:
        raise ValueError(
            f"source must hold {len(expected)} tensors: {missing[0]} is missing"
            f"{_and_more(missing)}. Fetch the folder again, or correct its config.json."
        )
    extra = sorted(name for name in names - expected.keys() if not _may_stay(name, config))
    if extra:
        raise ValueError(
            f"source tensor {extra[0]} {source.shape(extra[0])} must be known to the format "
            f"{format.value}{_and_more(extra)}. Its config.json describes no such tensor."
        )
    for name, shape in expected.items():
        if source.shape(name) != shape:
            raise ValueError(
                f"source tensor {name} {source.shape(name)} must have the shape that config.json "
                f"gives: got {shape}. Fetch the folder again, or correct its config.json."
            )


def _may_stay(name: str, config: ModelConfig) -> bool:
    """Whether an unlisted tensor may lie in the folder unread."""
    is_copy_of_embedding = name == "lm_head.weight" and config.tie_word_embeddings
    return is_copy_of_embedding or IGNORED_SOURCE.fullmatch(name) is not None


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def becomes_linear(source: ModelConfig, target: ModelConfig) -> list[bool]:
    """Per layer: whether it turns from softmax attention into `L`."""
    pairs = zip(source.layers.mixers, target.layers.mixers, strict=True)
    return [after == (MixerKind.linear,) and before != after for before, after in pairs]
