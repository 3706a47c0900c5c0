from __future__ import annotations

import re

import pytest

from models.conversion.config_keys import Format
from models.conversion.source_config import read_config
from models.conversion.weight_map import ffn_parameter, mixer_name, ours, theirs, transformer_name
from models.layouts import parameter_layouts
from tests.models.conversion import tiny_sources
from tests.models.conversion.test_source_config import QWEN2_5_7B, SPIKINGBRAIN_7B


@pytest.mark.parametrize("case", list(tiny_sources.CASES))
def test_names_and_shapes_are_those_of_transformers(case: str) -> None:
    pytest.importorskip("transformers")
    model = tiny_sources.build(case)
    config = read_config(model.config.to_dict())
    format = Format(model.config.model_type)
    found = {
        theirs(name, format): layout.global_shape
        for name, layout in parameter_layouts(config).items()
    }
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert found == expected


@pytest.mark.parametrize("raw", [QWEN2_5_7B, SPIKINGBRAIN_7B])
def test_the_table_reads_both_ways(raw: dict[str, object]) -> None:
    format = Format(raw["model_type"])
    names = list(parameter_layouts(read_config(raw)))
    translated = [theirs(name, format) for name in names]
    assert None not in translated
    assert len(set(translated)) == len(names)
    assert [ours(str(name), format) for name in translated] == names


def test_public_format_names() -> None:
    """The names of the released checkpoint, one linear and one windowed layer."""
    layouts = parameter_layouts(read_config(SPIKINGBRAIN_7B))
    names = [theirs(name, Format.gla_swa) for name in layouts]
    linear = sorted(str(n).removeprefix("model.layers.0.") for n in names if ".layers.0." in str(n))
    assert linear == sorted([
        "attn_norm.weight", "mlp_norm.weight",
        "attn.q_proj.weight", "attn.q_proj.bias", "attn.k_proj.weight", "attn.k_proj.bias",
        "attn.v_proj.weight", "attn.v_proj.bias", "attn.o_proj.weight",
        "attn.gk_proj.0.weight", "attn.gk_proj.1.weight", "attn.gk_proj.1.bias",
        "attn.g_norm.weight",
        "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight",
    ])  # fmt: skip
    window = [n for n in names if ".layers.1." in str(n)]
    assert len(window) == 12
    assert not [n for n in window if re.search("gk_proj|g_norm", str(n))]
    rest = [n for n in names if ".layers." not in str(n)]
    assert rest == ["model.embeddings.weight", "model.norm.weight", "lm_head.weight"]


def test_what_a_format_has_no_name_for() -> None:
    assert theirs("blocks.0.mixer.gate_up.bias", Format.qwen2) is None
    assert theirs("blocks.0.mixer.q_norm.weight", Format.gla_swa) is None
    assert theirs("blocks.0.mixer.unheard_of", Format.qwen2) is None
    assert theirs("unheard_of", Format.qwen2) is None
    assert ours("model.layers.0.attn.gk_proj.1.bias", Format.qwen2) is None
    assert ours("model.layers.0.self_attn.unheard_of", Format.qwen2) is None
    assert ours("unheard_of", Format.gla_swa) is None


def test_names_of_branches_and_experts_lead_back_to_the_transformer() -> None:
    assert mixer_name(12, "gate_up.bias") == "blocks.12.mixer.gate_up.bias"
    assert ffn_parameter("blocks.3.ffn.shared.up_proj.weight") == (3, "shared.up_proj.weight")
    pairs = {
        "blocks.1.mixer.linear.k_proj.bias": "blocks.1.mixer.k_proj.bias",
        "blocks.1.mixer.sliding_window.o_proj.weight": "blocks.1.mixer.o_proj.weight",
        "blocks.1.mixer.full.q_norm.weight": "blocks.1.mixer.q_norm.weight",
        "blocks.2.ffn.experts.up_proj.weight": "blocks.2.ffn.up_proj.weight",
        "blocks.2.ffn.shared.down_proj.weight": "blocks.2.ffn.down_proj.weight",
        "embedding.weight": "embedding.weight",
    }
    for name, expected in pairs.items():
        assert transformer_name(name) == expected
