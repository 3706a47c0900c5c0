from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from models.config import ModelConfig
from models.expert_config import Balance, ExpertConfig
from models.layers import ParamLayout
from models.layouts import is_new_parameter, parameter_layouts
from models.mixer_config import (
    BranchConfig,
    BranchMerge,
    BranchNorm,
    BranchProjections,
    FeatureMap,
    GateKind,
    LinearAttentionConfig,
    SinkConfig,
)
from models.model import Model
from tests.models.tiny import tiny_config

TIED = LinearAttentionConfig(feature_map=FeatureMap.sigmoid, gate=GateKind.key_tied)
VARIANTS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3-tied": {"qkv_bias": False, "qk_norm": True, "tie_word_embeddings": True},
    "all-biases": {"output_bias": True, "ffn_bias": True},
    "key-tied": {"linear": TIED},
}
for _gate, _merge, _norm, _projections in itertools.product(
    (LinearAttentionConfig(), TIED), BranchMerge, BranchNorm, BranchProjections
):
    _name = f"branches-{_gate.gate.name}-{_merge.name}-{_norm.name}-{_projections.name}"
    VARIANTS[_name] = {
        "mixers": "L+S F+L F+S L", "qk_norm": True, "output_bias": True, "linear": _gate,
        "branches": BranchConfig(merge=_merge, norm=_norm, projections=_projections),
    }  # fmt: skip


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
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


def names_of_block(config: ModelConfig, layer: int) -> set[str]:
    prefix = f"blocks.{layer}."
    return {name[len(prefix) :] for name in parameter_layouts(config) if name.startswith(prefix)}


def test_branches_share_projections_or_have_their_own() -> None:
    plain = {"mixers": "L+S S L _", "linear": TIED, "qkv_bias": False}
    shared = names_of_block(tiny_config(**plain), 0)
    projections = {f"{name}_proj.weight" for name in "qkvo"}
    rest = {"mixer_norm.weight", *names_of_block(tiny_config(**plain), 3)}
    norms = {"mixer.linear.head_norm.weight", "mixer.sliding_window.head_norm.weight"}
    assert shared == {f"mixer.{name}" for name in projections} | norms | rest
    branches = BranchConfig(
        projections=BranchProjections.separate,
        norm=BranchNorm.after_output,
        merge=BranchMerge.learned,
    )
    separate = names_of_block(tiny_config(**plain, branches=branches), 0)
    kinds = ("linear", "sliding_window")
    assert separate == rest | {
        "mixer.linear.head_norm.weight", "mixer.merge.weight",
        *(f"mixer.{kind}.output_norm.weight" for kind in kinds),
        *(f"mixer.{kind}.{name}" for kind in kinds for name in projections),
    }  # fmt: skip


def test_experts_lie_along_their_own_dimension() -> None:
    moe = ExpertConfig(num_experts=4, num_shared_experts=2, intermediate_size=6)
    config = tiny_config(ffns="d e d d", moe=moe)
    table = parameter_layouts(config)
    D = config.hidden_size
    down = table["blocks.1.ffn.experts.down_proj.weight"]
    assert (down.global_shape, down.tp_dim, down.ep_dim) == ((4, D, 6), 2, 0)
    for name in ("gate_proj", "up_proj"):
        layout = table[f"blocks.1.ffn.experts.{name}.weight"]
        assert (layout.global_shape, layout.tp_dim, layout.ep_dim) == ((4, 6, D), 1, 0)
        assert table[f"blocks.1.ffn.shared.{name}.weight"].global_shape == (12, D)
    assert table["blocks.1.ffn.router.weight"] == ParamLayout((4, D), replicated_axes=("tp",))
    assert {name for name, layout in table.items() if layout.ep_dim is not None} == {
        f"blocks.1.ffn.experts.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")
    }


@pytest.mark.parametrize(
    ("balance", "name"),
    [(Balance.bias, "selection_bias"), (Balance.previous_step, "previous_load")],
)
def test_what_a_router_remembers_is_state(balance: Balance, name: str) -> None:
    config = tiny_config(ffns="e d d d", moe=ExpertConfig(num_experts=4, balance=balance))
    states = {name for name, layout in parameter_layouts(config).items() if layout.is_state}
    assert states == {f"blocks.0.ffn.router.{name}"}


def test_sinks_are_one_replicated_table() -> None:
    layouts = parameter_layouts(tiny_config(sinks=SinkConfig(num_tokens=3)))
    assert layouts["sinks.weight"].global_shape == (3, tiny_config().hidden_size)
    assert list(layouts)[:2] == ["embedding.weight", "sinks.weight"]


def test_new_parameters_of_branches_sinks_and_experts() -> None:
    config = tiny_config(
        mixers="L+S S F _", ffns="e d d d", sinks=SinkConfig(num_tokens=3),
        branches=BranchConfig(merge=BranchMerge.learned),
    )  # fmt: skip
    new = {name for name in parameter_layouts(config) if is_new_parameter(name)}
    assert new == {
        "sinks.weight", "blocks.0.mixer.linear.gate_down.weight", "blocks.0.ffn.router.weight",
        "blocks.0.mixer.linear.gate_up.weight", "blocks.0.mixer.linear.gate_up.bias",
        "blocks.0.mixer.linear.head_norm.weight", "blocks.0.mixer.merge.weight",
        "blocks.0.mixer.sliding_window.head_norm.weight",
    }  # fmt: skip


def test_new_parameters_are_gates_and_head_norms_only() -> None:
    new = {name for name in parameter_layouts(tiny_config()) if is_new_parameter(name)}
    assert new == {
        "blocks.0.mixer.gate_down.weight", "blocks.0.mixer.gate_up.weight",
        "blocks.0.mixer.gate_up.bias", "blocks.0.mixer.head_norm.weight",
    }  # fmt: skip
