"""The arithmetic behind the curves of a report."""

from __future__ import annotations

import numpy as np
import pytest

from launch.report_figures import MAX_POINTS, Axis, Line, curves, share_limits, smooth, thin


def test_smoothing_keeps_constants_lines_and_the_start() -> None:
    constant = np.full(300, 2.5)
    np.testing.assert_allclose(smooth(constant), constant, rtol=1e-12)
    line = np.arange(300.0)
    np.testing.assert_allclose(smooth(line)[:290], line[:290], rtol=1e-12)
    assert smooth(line)[0] == 0.0


def test_smoothing_removes_noise_up_to_the_last_point() -> None:
    noise = np.random.default_rng(0).standard_normal(3000)
    smoothed = smooth(noise)
    assert smoothed[200:].std() < 0.15
    assert abs(smoothed[-1]) < 0.4


def test_long_runs_are_averaged_down() -> None:
    steps = np.arange(1.0, 10_001.0)
    thinned, values = thin(steps, steps * 2)
    assert len(thinned) == MAX_POINTS
    np.testing.assert_allclose(values, thinned * 2, rtol=1e-12)
    assert thinned[0] == np.arange(1, 8).mean()
    assert (np.diff(thinned) > 0).all()
    short = steps[:10]
    assert thin(short, short) == (short, short) or np.array_equal(thin(short, short)[0], short)


def test_share_limits_are_wide_enough_to_calm_noise() -> None:
    low, high = share_limits([0.140, 0.141])
    assert high - low == pytest.approx(0.1, abs=5e-3)
    assert low < 0.14 < 0.141 < high
    low, high = share_limits([0.0, 1.0])
    assert low == 0.0
    assert high == pytest.approx(1.0, abs=5e-3)
    assert share_limits([]) == share_limits([0.0, 1.0])


@pytest.mark.parametrize("num_points", [1, 2, 39, 41, 4000])
def test_curves_of_any_length_render(num_points: int) -> None:
    steps = np.arange(1.0, num_points + 1)
    lines = [Line(steps, 5 / steps, "a", is_noisy=True), Line(steps, steps, "b", is_markers=True)]
    image = curves(lines, Axis("Loss", 'nats & "more"', {"spikes on": 1.0}, cuts_start=True))
    assert image.startswith('<img src="data:image/svg+xml;base64,')
    assert image.endswith('alt="Loss: nats &amp; &quot;more&quot; over optimizer steps">')
