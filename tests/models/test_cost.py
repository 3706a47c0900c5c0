from __future__ import annotations

import pytest
import torch

from models import cost
from models.config import ModelConfig
from models.model import Model
from tests.models.tiny import tiny_config, tiny_model

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
