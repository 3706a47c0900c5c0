from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from models.config import ModelConfig
from models.mixer_config import RopeConfig, RopeType
from models.rotary import Rotary, inverse_frequencies, rotate
from models.sequence import SequenceContext
from tests.models.tiny import packed, tiny_config
from tests.support.closeness import assert_close


def _config(head_dim: int = 64, **rope: Any) -> ModelConfig:
    return tiny_config(
        head_dim=head_dim, rope=RopeConfig(**rope), max_position_embeddings=rope.get("seen", 4096)
    )


@pytest.mark.parametrize(
    "options",
    [
        {"type": "linear", "factor": 4.0},
        {"type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
        {
            "type": "llama3", "factor": 32.0, "low_freq_factor": 1.5, "high_freq_factor": 6.0,
            "original_max_position_embeddings": 512, "theta": 500_000.0,
        },
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768},
        {
            "type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256,
            "truncate": False, "beta_fast": 16.0, "beta_slow": 2.0, "theta": 10_000.0,
        },
        {
            "type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096,
            "mscale": 1.0, "mscale_all_dim": 0.7,
        },
        {
            "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096,
            "attention_factor": 1.25,
        },
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 6},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)  # fmt: skip
def test_scaled_frequencies_are_those_of_transformers(options: dict[str, Any]) -> None:
    theta = options.get("theta", 1_000_000.0)
    ours = RopeConfig(**(options | {"type": RopeType[options["type"]], "theta": theta}))
    frequencies, scale = inverse_frequencies(tiny_config(head_dim=64, rope=ours))
    defaults = {
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    }
    parameters = defaults | options | {"rope_theta": theta, "rope_type": options["type"]}
    del parameters["type"]
    theirs = LlamaConfig(
        hidden_size=256, num_attention_heads=4, head_dim=64, rope_parameters=parameters,
        max_position_embeddings=options.get("original_max_position_embeddings", 4096),
    )  # fmt: skip
    expected, expected_scale = ROPE_INIT_FUNCTIONS[options["type"]](theirs, torch.device("cpu"))
    assert frequencies.dtype == torch.float64
    ratio = frequencies / expected.double()
    assert_close(ratio, torch.ones_like(ratio), absolute=2e-6)
    assert scale == pytest.approx(expected_scale, rel=1e-12)


def test_plain_frequencies_are_powers_of_theta() -> None:
    frequencies, scale = inverse_frequencies(_config(head_dim=8, theta=10_000.0))
    assert_close(frequencies, [1.0, 0.1, 0.01, 0.001], relative=1e-15)
    assert scale == 1.0


def test_without_an_original_length_the_maximum_positions_are_it() -> None:
    rope = RopeConfig(type=RopeType.llama3, factor=8.0)
    short = inverse_frequencies(tiny_config(rope=rope, max_position_embeddings=64))[0]
    named = RopeConfig(type=RopeType.llama3, factor=8.0, original_max_position_embeddings=64)
    assert torch.equal(short, inverse_frequencies(tiny_config(rope=named))[0])


def test_angles_are_exact_a_million_tokens_in() -> None:
    # With theta = 2^16 and H = 8 the frequencies are powers of two: exact rational angles.
    rotary = Rotary(_config(head_dim=8, theta=65_536.0))
    rotation = rotary.compute(torch.tensor([[1_048_573]]), torch.float32)
    for index, frequency in enumerate([1, Fraction(1, 16), Fraction(1, 256), Fraction(1, 4096)]):
        angle = torch.tensor(float(1_048_573 * frequency), dtype=torch.float64)
        assert abs(rotation.cos[0, 0, 0, index].double() - angle.cos()) < 1e-7
        assert abs(rotation.sin[0, 0, 0, index].double() - angle.sin()) < 1e-7


def test_rotation_is_complex_multiplication_forward_and_backward() -> None:
    config = _config(head_dim=8, theta=100.0)
    sequence = packed([[5, 2], [3, 4]])
    rotation = Rotary(config).for_sequence(sequence, torch.float64)
    x = torch.randn(2, 7, 3, 8, dtype=torch.float64, requires_grad=True)
    out = rotate(x, rotation)
    frequencies = 100.0 ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    turn = torch.exp(1j * sequence.positions[..., None] * frequencies)[:, :, None]
    turned = torch.complex(x[..., :4], x[..., 4:]) * turn
    expected = torch.cat([turned.real, turned.imag], dim=-1)
    assert_close(out, expected, relative=1e-14)
    probe = torch.randn_like(out)
    (actual,) = torch.autograd.grad(out, x, probe)
    (wanted,) = torch.autograd.grad(expected, x, probe)
    assert_close(actual, wanted, relative=1e-14)


def test_bf16_inputs_rotate_by_float32_tables_and_stay_bf16() -> None:
    rotary = Rotary(_config(head_dim=8))
    rotation = rotary.for_range(1000, 4, torch.device("cpu"), torch.bfloat16)
    assert rotation.cos.dtype == torch.float32
    assert rotate(torch.ones(1, 4, 1, 8, dtype=torch.bfloat16), rotation).dtype == torch.bfloat16


def test_layers_of_one_batch_share_a_table_and_the_next_batch_gets_its_own() -> None:
    rotary = Rotary(_config(head_dim=8))
    first, second = packed([[5, 2]]), packed([[4, 3]])
    table = rotary.for_sequence(first, torch.float32)
    assert rotary.for_sequence(first, torch.float32) is table
    other = rotary.for_sequence(second, torch.float32)
    assert not torch.equal(other.cos, table.cos)
    assert rotary.for_sequence(second, torch.float64).cos.dtype == torch.float64
    whole = SequenceContext.one_document_per_row(2, 7)
    rows = rotary.for_sequence(whole, torch.float32)
    assert rows is rotary.for_range(0, 7, torch.device("cpu"), torch.float32)
    assert rows is not rotary.for_range(1, 7, torch.device("cpu"), torch.float32)
    assert_close(rotary.for_sequence(first, torch.float32).cos, table.cos)
