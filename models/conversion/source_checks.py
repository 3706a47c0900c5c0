"""Whether a source folder is whole and whether a target model can be made from it."""

from __future__ import annotations

import dataclasses
import logging
from enum import Enum

from models.config import ModelConfig
from models.conversion.config_keys import Format
from models.conversion.huggingface import TensorSource
from models.conversion.weight_map import IGNORED_SOURCE, KEY_BIAS, mixer_name, theirs
from models.layer_pattern import FfnKind, MixerKind, Mixers
from models.layouts import parameter_layouts
from models.mixer_config import BranchProjections, SinkInit

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
                "Choose the model= that was made for this source, or change only patterns."
            )
    if target.tie_word_embeddings and not source.tie_word_embeddings:
        raise ValueError(
            "model.tie_word_embeddings (true) must be false: the source has its own output head."
        )
    _check_mixers(source, target)
    _check_ffns(source, target)
    _check_sinks(source, target)


def _check_sinks(source: ModelConfig, target: ModelConfig) -> None:
    if source.uses_sinks:
        _check_same(source, target, "sinks", "sinks")
    token, is_read = target.bos_token_id, target.uses_sinks and target.sinks.init is SinkInit.bos
    if is_read and token is not None and not 0 <= token < target.vocab_size:
        raise ValueError(
            f"model.bos_token_id ({token}) must have an embedding for sinks.init (bos): got "
            f"vocab_size {target.vocab_size}. Set model.bos_token_id, or sinks.init=random."
        )


def _check_same(source: ModelConfig, target: ModelConfig, group: str, parts: str) -> None:
    """Refuse other options of what the source has already, by the first that differs."""
    before, after = getattr(source, group), getattr(target, group)
    for field in dataclasses.fields(before):
        given, kept = (getattr(each, field.name) for each in (after, before))
        if given != kept:
            given, kept = (v.value if isinstance(v, Enum) else v for v in (given, kept))
            raise ValueError(
                f"model.{group}.{field.name} ({given}) must equal the source's, which has {parts}: "
                f"got {kept}. Leave model.{group} as it is there (model=from_checkpoint does)."
            )


def _check_mixers(source: ModelConfig, target: ModelConfig) -> None:
    """Refuse to make anything else of layers that are no Transformer's, or with other options."""
    mixers = source.layers.mixers
    for key, is_read, layers in (
        ("linear", any(MixerKind.linear in layer for layer in mixers), "L"),
        ("branches", any(len(layer) > 1 for layer in mixers), "X+Y"),
        ("moe", FfnKind.mixture_of_experts in source.layers.ffns, "e"),
    ):
        if is_read:
            _check_same(source, target, key, f"{layers} layers")
    pairs = zip(source.layers.mixers, target.layers.mixers, strict=True)
    for index, (before, after) in enumerate(pairs):
        is_transformers = len(before) == 1 and MixerKind.linear not in before
        if not is_transformers and after not in (before, ()):
            raise ValueError(
                f"mixers ({target.mixers}) layer {index} must stay {_symbol(before)} as in the "
                f"source: got {_symbol(after)}. Its gates and norms have no place in another mixer."
            )


def _check_ffns(source: ModelConfig, target: ModelConfig) -> None:
    """Refuse experts that are not copies of the source's dense FFN."""
    experts = FfnKind.mixture_of_experts
    pairs = zip(source.layers.ffns, target.layers.ffns, strict=True)
    for index, (before, after) in enumerate(pairs):
        if before is experts and after is not experts:
            raise ValueError(
                f"ffns ({target.ffns}) layer {index} must stay e as in the source: got "
                f"{after.value}. There is no dense FFN in the source to make it of."
            )
        if before is not experts and after is experts:
            _check_expert_size(source, target, index)


def _check_expert_size(source: ModelConfig, target: ModelConfig, layer: int) -> None:
    if target.expert_intermediate_size != source.intermediate_size:
        raise ValueError(
            f"model.moe.intermediate_size ({target.expert_intermediate_size}) must be that of the "
            f"dense FFN of which layer {layer} is made: got {source.intermediate_size} in the "
            "source. Set it to null."
        )


def _symbol(mixers: Mixers) -> str:
    return "+".join(kind.value for kind in mixers) or "_"


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


def becomes_new(source: ModelConfig, target: ModelConfig) -> list[bool]:
    """Per layer: whether it turns from softmax attention into `L` or parallel branches."""
    pairs = zip(source.layers.mixers, target.layers.mixers, strict=True)
    return [
        before != after and (len(after) > 1 or MixerKind.linear in after) for before, after in pairs
    ]


def linear_key_bias(target: ModelConfig, layer: int) -> str | None:
    """The key bias that a layer's linear mixer reads, alone or as a branch, and no other does."""
    mixers = target.layers.mixers[layer]
    if MixerKind.linear not in mixers:
        return None
    if len(mixers) == 1:
        return mixer_name(layer, KEY_BIAS)
    if target.branches.projections is BranchProjections.shared:
        return None
    return mixer_name(layer, f"{MixerKind.linear.name}.{KEY_BIAS}")


def upcycled(source: ModelConfig, target: ModelConfig) -> list[int]:
    """Layers whose dense FFN becomes experts."""
    pairs = zip(source.layers.ffns, target.layers.ffns, strict=True)
    return [
        layer
        for layer, (before, after) in enumerate(pairs)
        if before is FfnKind.dense and after is FfnKind.mixture_of_experts
    ]
