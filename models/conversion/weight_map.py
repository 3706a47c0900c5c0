"""The table between our parameter names and those of every folder format, read both ways.

Our own format (`models.exported`) keeps our names, except what transformers looks for by name.
"""

from __future__ import annotations

import re

from models.conversion.config_keys import Format
from models.layer_pattern import MixerKind

_WHOLE: tuple[tuple[str, str, str], ...] = (
    ("embedding.weight", "model.embed_tokens.weight", "model.embeddings.weight"),
    ("final_norm.weight", "model.norm.weight", "model.norm.weight"),
    ("head.weight", "lm_head.weight", "lm_head.weight"),
)
"""(ours, Transformer formats, gla_swa) outside the blocks."""

_BLOCK: tuple[tuple[str, str | None, str | None], ...] = (
    ("mixer_norm.weight", "input_layernorm.weight", "attn_norm.weight"),
    ("mixer.q_proj.weight", "self_attn.q_proj.weight", "attn.q_proj.weight"),
    ("mixer.q_proj.bias", "self_attn.q_proj.bias", "attn.q_proj.bias"),
    ("mixer.k_proj.weight", "self_attn.k_proj.weight", "attn.k_proj.weight"),
    ("mixer.k_proj.bias", "self_attn.k_proj.bias", "attn.k_proj.bias"),
    ("mixer.v_proj.weight", "self_attn.v_proj.weight", "attn.v_proj.weight"),
    ("mixer.v_proj.bias", "self_attn.v_proj.bias", "attn.v_proj.bias"),
    ("mixer.o_proj.weight", "self_attn.o_proj.weight", "attn.o_proj.weight"),
    ("mixer.o_proj.bias", "self_attn.o_proj.bias", None),
    ("mixer.q_norm.weight", "self_attn.q_norm.weight", None),
    ("mixer.k_norm.weight", "self_attn.k_norm.weight", None),
    ("mixer.gate_down.weight", None, "attn.gk_proj.0.weight"),
    ("mixer.gate_up.weight", None, "attn.gk_proj.1.weight"),
    ("mixer.gate_up.bias", None, "attn.gk_proj.1.bias"),
    ("mixer.head_norm.weight", None, "attn.g_norm.weight"),
    ("ffn_norm.weight", "post_attention_layernorm.weight", "mlp_norm.weight"),
    ("ffn.gate_proj.weight", "mlp.gate_proj.weight", "mlp.gate_proj.weight"),
    ("ffn.gate_proj.bias", "mlp.gate_proj.bias", None),
    ("ffn.up_proj.weight", "mlp.up_proj.weight", "mlp.up_proj.weight"),
    ("ffn.up_proj.bias", "mlp.up_proj.bias", None),
    ("ffn.down_proj.weight", "mlp.down_proj.weight", "mlp.down_proj.weight"),
    ("ffn.down_proj.bias", "mlp.down_proj.bias", None),
)
"""(ours, Transformer formats, gla_swa) inside block i; None where a format has no such tensor."""

_OWN_HEAD, _OWN_PREFIX = "lm_head.weight", "model."

IGNORED_SOURCE = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Buffers that old checkpoints stored; recomputed here from the config."""

GATE_DOWN, GATE_UP, GATE_BIAS = "gate_down.weight", "gate_up.weight", "gate_up.bias"
HEAD_NORM, OUTPUT_NORM, MERGE = "head_norm.weight", "output_norm.weight", "merge.weight"
SINKS = "sinks.weight"
KEY_WEIGHT, KEY_BIAS = "k_proj.weight", "k_proj.bias"


def theirs(name: str, format: Format) -> str | None:
    """A format's name of our parameter; None where the format has none."""
    if format is Format.synfire:
        return _OWN_HEAD if name == "head.weight" else f"{_OWN_PREFIX}{name}"
    column = 2 if format is Format.gla_swa else 1
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    rows = _BLOCK if match else _WHOLE
    inner = match.group(2) if match else name
    for row in rows:
        if row[0] == inner:
            found = row[column]
            return f"model.layers.{match.group(1)}.{found}" if match and found else found
    return None


def ours(name: str, format: Format) -> str | None:
    """Our name of a format's tensor; None for a tensor that the table does not know."""
    if format is Format.synfire:
        if name == _OWN_HEAD:
            return "head.weight"
        return name.removeprefix(_OWN_PREFIX) if name.startswith(_OWN_PREFIX) else None
    column = 2 if format is Format.gla_swa else 1
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    rows = _BLOCK if match else _WHOLE
    inner = match.group(2) if match else name
    for row in rows:
        if row[column] == inner:
            return f"blocks.{match.group(1)}.{row[0]}" if match else row[0]
    return None


def mixer_name(layer: int, short: str) -> str:
    """`blocks.{layer}.mixer.<short name>`."""
    return f"blocks.{layer}.mixer.{short}"


_BRANCHES = "|".join(kind.name for kind in MixerKind)


def transformer_name(name: str) -> str:
    """Our name of the Transformer's parameter that one of branches or experts is made of.

    `mixer.linear.q_proj` is made of `mixer.q_proj`, `ffn.experts.up_proj` of `ffn.up_proj`.
    """
    name = re.sub(rf"\.mixer\.({_BRANCHES})\.", ".mixer.", name)
    return re.sub(r"\.ffn\.(experts|shared)\.", ".ffn.", name)


def ffn_parameter(name: str) -> tuple[int, str]:
    """(layer, short name) of `blocks.{i}.ffn.<short name>`."""
    match = re.fullmatch(r"blocks\.(\d+)\.ffn\.(.+)", name)
    assert match is not None, name
    return int(match.group(1)), match.group(2)
