"""The energy estimate reproduces the report's numbers."""

from __future__ import annotations

import pytest

from models.spiking.energy import estimate


def test_reports_example() -> None:
    """1.13 spikes a value: 0.034 pJ, 97.7 % below FP16 (44.2 x), 6.78 x below INT8."""
    energy = estimate(1.13)
    assert energy.spiking_pj == pytest.approx(0.0339, abs=1e-12)
    assert energy.saved_versus_fp16 == pytest.approx(0.977, abs=5e-4)
    assert energy.saved_versus_int8 == pytest.approx(0.8526, abs=5e-4)
    assert energy.fp16_mac_pj / energy.spiking_pj == pytest.approx(44.2, abs=0.05)
    assert energy.int8_mac_pj / energy.spiking_pj == pytest.approx(6.78, abs=0.01)


def test_silence_costs_nothing() -> None:
    assert estimate(0.0).spiking_pj == 0.0
    assert estimate(0.0).saved_versus_fp16 == 1.0


@pytest.mark.parametrize("wrong", [-0.1, float("nan")])
def test_refuses_impossible_means(wrong: float) -> None:
    with pytest.raises(ValueError, match="must be at least 0"):
        estimate(wrong)
