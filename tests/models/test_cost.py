from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models import cost
from models.config import ModelConfig
from models.expert_config import Balance, ExpertConfig
from models.layer_pattern import LayerPattern
from models.mixer_config import (
    BranchConfig,
    BranchNorm,
    BranchProjections,
    FeatureMap,
    GateKind,
    LinearAttentionConfig,
    SinkConfig,
)
from models.model import Model
from models.routing import Routing
from models.sequence import SequenceContext
from tests.models.tiny import random_tokens, tiny_config, tiny_model

SPIKINGBRAIN_7B = ModelConfig(
    vocab_size=152_064,
    hidden_size=3584,
    intermediate_size=18_944,
    num_attention_heads=28,
    num_key_value_heads=4,
    head_dim=128,
    mixers="[L S]*14",
    ffns="d*28",
    qkv_bias=True,
    window_tokens=4096,
)


def test_the_7b_has_the_parameters_of_the_report_by_arithmetic_and_on_the_meta_device() -> None:
    assert cost.parameter_count(SPIKINGBRAIN_7B) == 7_616_542_976
    with torch.device("meta"):
        model = Model(SPIKINGBRAIN_7B)
    assert sum(parameter.numel() for parameter in model.parameters()) == 7_616_542_976
    # 14 x 12 of sliding-window layers, 14 x 16 of linear ones, embedding, final norm, head.
    assert len(list(model.parameters())) == 395


def test_conversion_adds_the_parameters_of_the_report() -> None:
    assert cost.new_parameter_count(SPIKINGBRAIN_7B) == 926_464
    assert cost.new_parameter_count(tiny_config(mixers="S F F _")) == 0


# 28 layers; the layout of experts is that of Fig. 3 of the report.
SPIKINGBRAIN_76B: dict[str, Any] = {
    "mixers": "[[L+S]*6 L+F]*4",
    "ffns": "d*3 e d e d e d e d e*17",
    "linear": LinearAttentionConfig(feature_map=FeatureMap.sigmoid, gate=GateKind.key_tied),
    "sinks": SinkConfig(num_tokens=128),
    "moe": ExpertConfig(num_experts=16, num_shared_experts=1, top_k=1),
}


@pytest.mark.parametrize(
    ("projections", "total", "active"),
    [(BranchProjections.shared, 76.06, 11.89), (BranchProjections.separate, 76.88, 12.72)],
)
def test_the_76b_has_the_parameters_of_the_report(
    projections: BranchProjections, total: float, active: float
) -> None:
    config = replace(
        SPIKINGBRAIN_7B, **SPIKINGBRAIN_76B, branches=BranchConfig(projections=projections)
    )
    assert cost.parameter_count(config) / 1e9 == pytest.approx(total, abs=0.005)
    assert cost.active_parameter_count(config) / 1e9 == pytest.approx(active, abs=0.005)


def test_routers_state_is_no_parameter_and_idle_experts_are_not_active() -> None:
    moe = ExpertConfig(num_experts=4, num_shared_experts=2, top_k=2, intermediate_size=24)
    config = tiny_config(ffns="d e d e", moe=moe)
    with_bias = tiny_config(ffns="d e d e", moe=replace(moe, balance=Balance.bias))
    one_expert = 3 * 24 * config.hidden_size
    layer = 6 * one_expert + 4 * config.hidden_size
    dense = 3 * config.intermediate_size * config.hidden_size
    whole = cost.parameter_count(config)
    assert whole - cost.parameter_count(tiny_config()) == 2 * (layer - dense)
    assert cost.parameter_count(with_bias) == whole
    added = cost.new_parameter_count(with_bias) - cost.new_parameter_count(tiny_config())
    assert added == 2 * 4 * config.hidden_size
    assert cost.active_parameter_count(config) == whole - 2 * 2 * one_expert
    met = cost.matrix_parameter_count(config) - cost.matrix_parameter_count(tiny_config())
    assert met == 2 * (4 * one_expert + 4 * config.hidden_size - dense)


def test_matrix_parameters_count_the_head_once_and_not_the_lookup() -> None:
    config = tiny_config()
    model = tiny_model(config)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    assert cost.matrix_parameter_count(config) == matrices - 61 * 24
    assert cost.matrix_parameter_count(tiny_config(tie_word_embeddings=True)) == matrices - 61 * 24
    assert (
        cost.parameter_count(tiny_config(tie_word_embeddings=True))
        == sum(p.numel() for p in model.parameters()) - 61 * 24
    )


def test_flops_of_the_7b_are_those_of_the_specification() -> None:
    for tokens, expected in ((8192, 44.3e9), (131_072, 44.9e9)):
        window = cost.mean_visible([tokens], 4096)
        full = cost.mean_visible([tokens])
        flops = cost.flops_per_token(SPIKINGBRAIN_7B, full, window)
        assert flops == pytest.approx(expected, abs=0.06e9)


def test_flops_equal_a_count_by_hand() -> None:
    config = ModelConfig(
        vocab_size=10, hidden_size=4, intermediate_size=6, num_attention_heads=2,
        num_key_value_heads=1, head_dim=2, mixers="F S L", ffns="d*3", window_tokens=3,
    )  # fmt: skip
    # A layer: q 4x4, k and v 4x2, o 4x4, three of 4x6; the gate of L: 4x16 and 16x2; head 4x10.
    matrices = 3 * (16 + 8 + 8 + 16 + 3 * 24) + 64 + 32 + 40
    # Scores and values: two products of 2 FLOPs a key and query channel (4 channels).
    full, window = 4 * 5.5 * 4, 4 * 2.5 * 4
    # Reading and writing 2x2 states, 2 FLOPs an entry: 2 query heads, 1 key-value head; and chunks
    # of 8, of which a token sees half on average: two products over 2 heads of 2 channels.
    linear = 2 * 4 * (2 + 1) + 2 * (2 * 8 / 2 * 2 * 2)
    expected = 3 * (2 * matrices + full + window + linear)
    assert cost.flops_per_token(config, 5.5, 2.5, linear_chunk_tokens=8) == expected


def test_a_shared_output_projection_is_met_twice_where_branches_meet_after_it() -> None:
    before, after = (
        cost.matrix_parameter_count(
            tiny_config(mixers="L+S S F _", branches=BranchConfig(norm=norm))
        )
        for norm in BranchNorm
    )
    assert after - before == 32 * 24
    apart = [
        cost.matrix_parameter_count(
            tiny_config(
                mixers="L+S S F _",
                branches=BranchConfig(norm=norm, projections=BranchProjections.separate),
            )
        )
        for norm in BranchNorm
    ]
    # q, k, v and o of the second branch.
    assert apart == [before + (2 * 32 + 2 * 16) * 24] * 2


def test_a_layer_mixes_for_each_of_its_branches() -> None:
    alone = cost.flops_by_part(tiny_config(mixers="L S F _"), 7.0, 4.0)
    both = cost.flops_by_part(tiny_config(mixers="L+S S+F _ _"), 7.0, 4.0)
    linear, window, full = alone.linear[0], alone.softmax[1], alone.softmax[2]
    assert (alone.softmax, alone.linear) == ((0, window, full, 0), (linear, 0, 0, 0))
    assert both.softmax == (window, window + full, 0, 0)
    assert both.linear == (linear, 0, 0, 0)
    assert both.layers[0] == both.products[0] + window + linear


def test_costs_of_parts_are_those_of_a_count_by_hand() -> None:
    config = ModelConfig(
        vocab_size=10, hidden_size=4, intermediate_size=6, num_attention_heads=2,
        num_key_value_heads=1, head_dim=2, mixers="F _", ffns="d*2",
    )  # fmt: skip
    parts = cost.flops_by_part(config, 5.0, 0.0)
    assert parts.layers == (3 * (2 * (16 + 8 + 8 + 16 + 72) + 4 * 5 * 4), 3 * 2 * 72)
    assert (parts.embedding, parts.head) == (0.0, 3 * 2 * 40)
    assert parts.total == cost.flops_per_token(config, 5.0, 0.0)


@pytest.mark.parametrize(
    ("lengths", "window"), [([1], None), ([7], None), ([7, 3, 1], None), ([7, 3, 1], 3), ([2], 100)]
)
def test_visible_keys_equal_a_count(lengths: list[int], window: int | None) -> None:
    seen = [min(i + 1, window or i + 1) for length in lengths for i in range(length)]
    assert cost.mean_visible(lengths, window) == pytest.approx(sum(seen) / len(seen), rel=1e-15)


def test_no_tokens_see_no_keys() -> None:
    assert cost.mean_visible([]) == 0.0


SINKS = SinkConfig(num_tokens=6)
PAST = SinkConfig(num_tokens=6, through_linear=False)
SINK_MODELS: dict[str, dict[str, Any]] = {
    "every mixer": {"mixers": "L S F _ F"},
    "past linear": {"mixers": "L L+S F L", "sinks": PAST},
    "shared branches": {"mixers": "L+S S+F L+F _"},
    "branches after": {
        "mixers": "L+S S+F L+F", "branches": BranchConfig(norm=BranchNorm.after_output),
    },
    "branches apart, past linear": {
        "mixers": "L+S F+L S F",
        "branches": BranchConfig(projections=BranchProjections.separate),
        "sinks": PAST,
    },
    "experts": {
        "mixers": "L+S S F L",
        "ffns": "d e e e",
        "moe": ExpertConfig(num_experts=4, num_shared_experts=1, top_k=2),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SINK_MODELS)
def test_flops_that_sinks_add_are_those_of_a_real_step(name: str) -> None:
    rows, length = 2, 16
    changes = {"sinks": SINKS} | SINK_MODELS[name]
    layers = len(LayerPattern.parse_mixers(changes["mixers"]))
    config = tiny_config(**({"ffns": f"d*{layers}"} | changes))
    plain = replace(config, sinks=SinkConfig())
    visible = cost.mean_visible([length]), cost.mean_visible([length], 5)
    own, tokens_alone, without = (
        cost.flops_by_part(each, *visible, microbatch_tokens=microbatch_tokens)
        for each, microbatch_tokens in ((config, rows * length), (config, None), (plain, None))
    )
    counted = [counted_flops(each, rows, length) for each in (config, plain)]
    products, forward = (with_sinks - less for with_sinks, less in zip(*counted, strict=True))
    added = sum(own.products) - sum(without.products)
    assert added * rows * length == pytest.approx(products, rel=1e-12)
    assert tokens_alone.products == without.products
    # Attention of the last layer's sinks themselves runs forward only.
    seen = [layer for layer, each in enumerate(config.sink_mixers) if each]
    by_sinks = [
        (own.softmax[layer] - tokens_alone.softmax[layer]) / (3 if layer < seen[-1] else 1)
        for layer in seen
    ]
    by_tokens = (sum(tokens_alone.softmax) - sum(without.softmax)) / 3
    assert (by_tokens + sum(by_sinks)) * rows * length == pytest.approx(forward, rel=1e-12)


def counted_flops(config: ModelConfig, rows: int, length: int) -> tuple[int, int]:
    """Of all products of matrices in a training step, and of softmax attention in its forward."""
    model, tokens = tiny_model(config), random_tokens(rows, length)
    sequence = SequenceContext.one_document_per_row(rows, length)
    routing = Routing(num_rows=rows, num_tokens=rows * length)
    softmax = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={softmax: attention_flops})
    with counter:
        loss = model(tokens, sequence, labels=tokens.roll(-1, 1), routing=routing)
        loss.backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(counts.get(each, 0) for each in (torch.ops.aten.mm, torch.ops.aten.addmm))
    return products, counts.get(softmax, 0)


def attention_flops(q: torch.Size, k: torch.Size, *others: Any, **more: Any) -> int:
    """Scores and values of queries `[B, N, Tq, H]` and keys `[B, G, Tk, H]`."""
    return 4 * math.prod(q) * k[2]


def test_sinks_of_the_76b_take_under_two_percent_of_its_flops() -> None:
    config = replace(SPIKINGBRAIN_7B, **SPIKINGBRAIN_76B)
    visible = cost.mean_visible([8192]), cost.mean_visible([8192], 4096)
    flops, without = (
        cost.flops_per_token(each, *visible, microbatch_tokens=8192)
        for each in (config, replace(config, sinks=SinkConfig()))
    )
    # 128 beside 8192 tokens, and 128 more keys a query.
    assert flops / without == pytest.approx(1.017, abs=0.002)
