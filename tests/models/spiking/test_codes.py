"""Spike codes are lossless and as long as the method says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.spiking.codes import UNSIGNED, SpikeCode, expand, num_steps, shift_to_unsigned

SIGNED = [code for code in SpikeCode if code not in UNSIGNED]


def random_counts(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("code", list(SpikeCode))
@pytest.mark.parametrize("most", [0, 1, 2, 7, 8, 300])
def test_weighted_planes_sum_to_the_counts(code: SpikeCode, most: int, dtype: torch.dtype) -> None:
    counts = random_counts(0 if code in UNSIGNED else -most, most, 5, 3, 4).to(dtype)
    train = expand(counts, code)
    total = torch.zeros(5, 3, 4, dtype=torch.int64)
    for weight, plane in zip(train.weights, train.planes, strict=True):
        total += weight * plane.to(torch.int64)
    assert torch.equal(total, counts.to(torch.int64))
    assert torch.equal(train.decode(), total)
    is_signed_spike = code in (SpikeCode.ternary, SpikeCode.bitwise_bidirectional)
    alphabet = {-1, 0, 1} if is_signed_spike else {0, 1}
    assert set(train.planes.unique().tolist()) <= alphabet


@pytest.mark.parametrize(
    ("code", "steps"),
    [
        (SpikeCode.binary, {0: 1, 1: 1, 2: 2, 7: 7, 8: 8, 255: 255}),
        (SpikeCode.ternary, {0: 1, 1: 1, 2: 2, 7: 7, 8: 8, 128: 128}),
        (SpikeCode.bitwise, {0: 1, 1: 1, 2: 2, 7: 3, 8: 4, 255: 8}),
        (SpikeCode.bitwise_bidirectional, {0: 1, 1: 1, 2: 2, 7: 3, 8: 4, 127: 7}),
        (SpikeCode.bitwise_twos_complement, {0: 2, 1: 2, 2: 3, 7: 4, 8: 5, 127: 8}),
    ],
)
def test_number_of_steps(code: SpikeCode, steps: dict[int, int]) -> None:
    """The formulas of the method; 255 and 127 are the report's illustration of an 8-bit range."""
    for most, expected in steps.items():
        counts = torch.tensor([0, most])
        assert num_steps(counts, code) == expected
        assert expand(counts, code).planes.shape[0] == expected
        if code in SIGNED:
            assert num_steps(-counts, code) == expected


def test_most_significant_bit_comes_first() -> None:
    train = expand(torch.tensor([6, -3]), SpikeCode.bitwise_bidirectional)
    assert train.weights.tolist() == [4, 2, 1]
    assert train.planes.T.tolist() == [[1, 1, 0], [0, -1, -1]]
    train = expand(torch.tensor([3, -3]), SpikeCode.bitwise_twos_complement)
    assert train.weights.tolist() == [-4, 2, 1]
    assert train.planes.T.tolist() == [[0, 1, 1], [1, 0, 1]]
    train = expand(torch.tensor([1, -3]), SpikeCode.ternary)
    assert train.planes.T.tolist() == [[1, 0, 0], [-1, -1, -1]]


def test_more_steps_than_needed_stay_silent_or_repeat_the_sign() -> None:
    counts = random_counts(-7, 7, 20)
    train = expand(counts, SpikeCode.bitwise_bidirectional, num_steps=9)
    assert train.planes.shape[0] == 9
    assert not train.planes[:6].any()
    for code in SIGNED:
        assert torch.equal(expand(counts, code, num_steps=9).decode(), counts)


def test_twos_complement_holds_one_more_negative_number() -> None:
    counts = torch.tensor([-8, 7])
    train = expand(counts, SpikeCode.bitwise_twos_complement, num_steps=4)
    assert torch.equal(train.decode(), counts)


def test_signed_counts_fit_an_unsigned_code_after_a_shift() -> None:
    counts = random_counts(-8, 7, 1000)
    shifted, zero_point = shift_to_unsigned(counts)
    assert zero_point == -8
    for code in UNSIGNED:
        assert torch.equal(expand(shifted, code).decode() + zero_point, counts)


def test_rate_codes_emit_the_mean_count_and_bits_emit_less() -> None:
    counts = torch.randn(50_000, generator=torch.Generator().manual_seed(1)).mul(3).round()
    ternary = expand(counts, SpikeCode.ternary)
    assert ternary.mean_spikes() == pytest.approx(float(counts.abs().mean()), rel=1e-5)
    bits = expand(counts, SpikeCode.bitwise_bidirectional).mean_spikes()
    shifted = expand(shift_to_unsigned(counts)[0], SpikeCode.binary).mean_spikes()
    assert bits < ternary.mean_spikes() < shifted


def test_nothing_to_shift_without_negative_counts() -> None:
    shifted, zero_point = shift_to_unsigned(torch.tensor([3, 5]))
    assert shifted.tolist() == [3, 5]
    assert zero_point == 0


def test_window_sparsity_pads_with_silent_leading_steps() -> None:
    train = expand(torch.tensor([8, 3, 0]), SpikeCode.bitwise_bidirectional)
    assert train.planes.shape[0] == 4
    assert train.window_sparsity() == pytest.approx(4 / 6)
    assert train.firing_rate() == pytest.approx(3 / 12)
    assert train.mean_spikes() == pytest.approx(1.0)


def test_empty_counts_expand_to_one_silent_step() -> None:
    train = expand(torch.zeros(0, 4), SpikeCode.bitwise_bidirectional)
    assert train.planes.shape == (1, 0, 4)
    assert train.decode().shape == (0, 4)


def test_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(ValueError, match="counts must be whole numbers: got fractions"):
        expand(torch.tensor([0.5]), SpikeCode.ternary)
    with pytest.raises(ValueError, match=r"counts \(code bitwise\) must be at least 0: got -2"):
        expand(torch.tensor([-2, 1]), SpikeCode.bitwise)
    with pytest.raises(ValueError, match=r"num_steps \(2\) must cover counts 0 to 4"):
        expand(torch.tensor([0, 4]), SpikeCode.bitwise_bidirectional, num_steps=2)
    with pytest.raises(ValueError, match=r"num_steps \(3\) must cover counts 0 to 4 .* -4 to 3"):
        expand(torch.tensor([0, 4]), SpikeCode.bitwise_twos_complement, num_steps=3)
