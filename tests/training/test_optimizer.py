"""Which parameter decays, freezes, and learns at its own rate; on the names of a real pattern."""

from __future__ import annotations

import logging

import pytest

from models.config import ModelConfig
from models.layouts import parameter_layouts
from training.config import OptimizerConfig
from training.optimizer import build_groups, decays, frozen_names

NAMES = list(
    parameter_layouts(
        ModelConfig(
            vocab_size=50, hidden_size=16, intermediate_size=24, num_attention_heads=4,
            num_key_value_heads=2, head_dim=4, mixers="L S F _", ffns="d*4", window_tokens=8,
            qkv_bias=True, qk_norm=True, ffn_bias=True,
        )
    )
)  # fmt: skip
GATES = [name for name in NAMES if ".mixer.gate_" in name or "head_norm" in name]

DECAYING_ENDINGS = (
    "embedding.weight", "head.weight", "q_proj.weight", "k_proj.weight", "v_proj.weight",
    "o_proj.weight", "gate_proj.weight", "up_proj.weight", "down_proj.weight",
)  # fmt: skip


def test_matrices_and_embeddings_decay_and_norms_gates_and_biases_do_not() -> None:
    assert [name for name in NAMES if decays(name)] == [
        name for name in NAMES if name.endswith(DECAYING_ENDINGS)
    ]
    for ending in ("gate_up.bias", "gate_up.weight", "gate_down.weight", "head_norm.weight",
                   "q_norm.weight", "final_norm.weight", "q_proj.bias"):  # fmt: skip
        matching = [name for name in NAMES if name.endswith(ending)]
        assert matching
        assert not any(decays(name) for name in matching)


def test_every_parameter_is_in_exactly_one_group() -> None:
    groups = build_groups(NAMES, OptimizerConfig(), new_parameters=GATES)
    assert sorted(name for group in groups for name in group.names) == sorted(NAMES)


def test_new_parameters_have_their_own_factor() -> None:
    config = OptimizerConfig(weight_decay=0.3, new_parameter_lr_factor=5.0)
    groups = build_groups(NAMES, config, new_parameters=[*GATES, "blocks.0.mixer.q_proj.weight"])
    found = {(group.weight_decay, group.lr_factor): group.names for group in groups}
    assert set(found) == {(0.3, 1.0), (0.0, 1.0), (0.3, 5.0), (0.0, 5.0)}
    assert found[(0.0, 5.0)] == tuple(GATES)
    assert found[(0.3, 5.0)] == ("blocks.0.mixer.q_proj.weight",)


def test_frozen_names_are_in_no_group() -> None:
    config = OptimizerConfig(freeze=["blocks.*.ffn.*", "embedding.weight"])
    trained = {name for group in build_groups(NAMES, config) for name in group.names}
    frozen = set(NAMES) - trained
    assert frozen == {name for name in NAMES if ".ffn." in name or name == "embedding.weight"}


def test_a_pattern_without_a_match_is_an_error_with_near_names() -> None:
    with pytest.raises(ValueError, match=r"'blocks\.0\.mixer\.qproj\.weight'\) must match") as info:
        frozen_names(NAMES, ["blocks.0.mixer.qproj.weight"])
    assert "blocks.0.mixer.q_proj.weight" in str(info.value)


def test_freezing_everything_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"must leave something to train: it matches all"):
        frozen_names(NAMES, ["blocks.*", "*.weight"])


def test_a_factor_that_reaches_nothing_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        build_groups(NAMES, OptimizerConfig(new_parameter_lr_factor=2.0))
    assert "new_parameter_lr_factor (2) has no effect" in caplog.text
    caplog.clear()
    build_groups(NAMES, OptimizerConfig(new_parameter_lr_factor=2.0), new_parameters=GATES)
    assert not caplog.text
