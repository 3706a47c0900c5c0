from __future__ import annotations

from typing import Any

import pytest
import torch

from models.layouts import is_new_parameter, parameter_layouts
from models.model import Model
from tests.models.tiny import tiny_config

VARIANTS: list[dict[str, Any]] = [
    {},
    {"qkv_bias": False, "qk_norm": True, "tie_word_embeddings": True},
    {"output_bias": True, "ffn_bias": True},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=["qwen2", "qwen3-tied", "all-biases"])
def test_the_table_names_every_parameter_of_the_model_with_its_shape(
    changes: dict[str, Any],
) -> None:
    config = tiny_config(**changes)
    with torch.device("meta"):
        model = Model(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    table = {name: layout.global_shape for name, layout in parameter_layouts(config).items()}
    assert table == shapes
    assert model.layouts() == parameter_layouts(config)


def test_names_are_the_documented_ones() -> None:
    names = set(parameter_layouts(tiny_config(qk_norm=True, mixers="L S F _")))
    linear = {
        "mixer_norm.weight", "mixer.q_proj.weight", "mixer.q_proj.bias", "mixer.k_proj.weight",
        "mixer.k_proj.bias", "mixer.v_proj.weight", "mixer.v_proj.bias", "mixer.o_proj.weight",
        "mixer.q_norm.weight", "mixer.k_norm.weight", "mixer.gate_down.weight",
        "mixer.gate_up.weight", "mixer.gate_up.bias", "mixer.head_norm.weight",
        "ffn_norm.weight", "ffn.gate_proj.weight", "ffn.up_proj.weight", "ffn.down_proj.weight",
    }  # fmt: skip
    assert {name[9:] for name in names if name.startswith("blocks.0.")} == linear
    softmax = {name for name in linear if "gate_down" not in name and "gate_up" not in name}
    softmax -= {"mixer.head_norm.weight"}
    for block in ("blocks.1.", "blocks.2."):
        assert {name[9:] for name in names if name.startswith(block)} == softmax
    none = {name for name in linear if name.startswith("ffn")}
    assert {name[9:] for name in names if name.startswith("blocks.3.")} == none
    rest = {name for name in names if not name.startswith("blocks.")}
    assert rest == {"embedding.weight", "final_norm.weight", "head.weight"}


def test_shares_over_tensor_parallel_ranks() -> None:
    table = parameter_layouts(tiny_config(qk_norm=True, output_bias=True))
    block = {name[9:]: layout for name, layout in table.items() if name.startswith("blocks.0.")}
    assert {name for name, layout in block.items() if layout.tp_dim == 1} == {
        "mixer.o_proj.weight",
        "ffn.down_proj.weight",
    }
    whole = {name for name, layout in block.items() if layout.tp_dim is None}
    assert whole == {name for name, layout in block.items() if layout.replicated_axes == ("tp",)}
    # Small tensors that see only this rank's heads: their gradients must be summed.
    partial = {name for name, layout in block.items() if layout.partial_axes == ("tp",)}
    assert partial == {
        "mixer.gate_down.weight", "mixer.head_norm.weight", "mixer.q_norm.weight",
        "mixer.k_norm.weight",
    }  # fmt: skip


def test_new_parameters_are_gates_and_head_norms_only() -> None:
    new = {name for name in parameter_layouts(tiny_config()) if is_new_parameter(name)}
    assert new == {
        "blocks.0.mixer.gate_down.weight", "blocks.0.mixer.gate_up.weight",
        "blocks.0.mixer.gate_up.bias", "blocks.0.mixer.head_norm.weight",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixers": "L+S F F F"}, r"got L\+S, and parallel branches are not in this release"),
        ({"ffns": "d d d e"}, "got e, and mixture of experts is not in this release"),
    ],
)
def test_patterns_of_later_releases_are_refused_by_name(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        parameter_layouts(tiny_config(**changes))
    with pytest.raises(ValueError, match=message):
        Model(tiny_config(**changes))
