"""The comparison itself: what it accepts, what it refuses and what it says."""

from __future__ import annotations

import math

import pytest
import torch

from tests.support.closeness import assert_close, relative_error


def test_equal_values_pass_without_a_tolerance() -> None:
    assert_close(torch.tensor([1.0, 2.0]), [1.0, 2.0])
    assert_close(3.0, 3.0)
    assert_close(torch.empty(0, 4), torch.empty(0, 4))


def test_relative_is_measured_against_the_largest_expected_value() -> None:
    assert_close([1.0, 100.0], [1.5, 100.0], relative=0.0051)
    with pytest.raises(AssertionError, match=r"differs by 5\.000e-01"):
        assert_close([1.0, 100.0], [1.5, 100.0], relative=0.0049)


def test_absolute_adds_to_relative() -> None:
    assert_close(1.3, 1.0, relative=0.1, absolute=0.21)
    with pytest.raises(AssertionError, match="allowed 2.900e-01"):
        assert_close(1.3, 1.0, relative=0.1, absolute=0.19)


def test_names_value_and_place() -> None:
    with pytest.raises(AssertionError, match=r"loss: .* at \(1,\): got 5, expected 2"):
        assert_close(torch.tensor([1.0, 5.0]), torch.tensor([1.0, 2.0]), name="loss")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_finite_never_passes(bad: float) -> None:
    with pytest.raises(AssertionError):
        assert_close([bad, 1.0], [1.0, 1.0], relative=1e9, absolute=1e9)
    with pytest.raises(AssertionError):
        assert_close([math.nan], [math.nan], relative=1e9)
    assert relative_error([math.nan], [1.0]) == math.inf


def test_shapes_must_agree() -> None:
    with pytest.raises(AssertionError, match=r"shape \(2,\) must equal \(1, 2\)"):
        assert_close(torch.zeros(2), torch.zeros(1, 2))
    with pytest.raises(AssertionError, match="shape"):
        relative_error(torch.zeros(2), torch.zeros(3))


def test_relative_error() -> None:
    assert relative_error([2.0, 4.0], [2.0, 5.0]) == pytest.approx(0.2)
    assert relative_error([0.0], [0.0]) == 0.0
    assert relative_error([1.0], [0.0]) == math.inf
