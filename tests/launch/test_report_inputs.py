"""Reading a run folder for a report."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from launch.report_inputs import by_site, is_number, read_inputs, read_rows, series, site_mean
from tests.launch.report_run import metrics_row, write_run


def test_half_a_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2}\n{"other": 1}\n{"step": 2, "lo')
    assert read_rows(path) == [{"step": 1, "loss": 2}]
    path.write_text('{"step": 1, "lo\n{"step": 2}\n')
    with pytest.raises(ValueError, match="Unterminated"):
        read_rows(path)


def test_series_drops_what_is_not_a_finite_number() -> None:
    values = [1.5, None, float("nan"), float("inf"), "x", True, 2]
    rows = [{"step": step, "loss": value} for step, value in enumerate(values)]
    steps, losses = series([*rows, {"step": 99}], "loss")
    assert steps.tolist() == [0, 6]
    assert losses.tolist() == [1.5, 2]
    assert not is_number(False)


def test_spike_metrics_by_site_and_their_mean() -> None:
    row = metrics_row(50) | {"spike/10/ffn_in/mean_spikes": 4.0, "spike/2/ffn_in/mean_spikes": 3.0}
    found = by_site(row, "mean_spikes")
    assert list(found["ffn_in"].items()) == [(0, 1.0), (1, 2.0), (2, 3.0), (10, 4.0)]
    assert (
        by_site({"spike/x/ffn_in/mean_spikes": 1.0, "spike/mean_spikes": 1.0}, "mean_spikes") == {}
    )
    assert site_mean(row, "mean_spikes") == 1.9
    assert site_mean({"step": 1}, "mean_spikes") is None


def test_settings_by_dotted_name(tmp_path: Path) -> None:
    inputs = read_inputs(write_run(tmp_path / "run"), {})
    assert inputs.setting("spiking.k") == 3.0
    assert inputs.setting("spiking.k.more") is None
    assert inputs.setting("nothing.at.all") is None
    assert inputs.problems == {}


@pytest.mark.parametrize(
    "arrays",
    [
        {"tokens": np.array(["a", "b"]), "counts": np.zeros((3, 4))},
        {"tokens": np.array(["a"]), "counts": np.zeros(4)},
        {"tokens": np.array(["a", {}], dtype=object), "counts": np.zeros((2, 4))},
        {"tokens": np.array(["a"])},
    ],
    ids=["lengths", "dims", "pickle", "no_counts"],
)
def test_unfit_raster_is_a_problem_not_a_crash(
    tmp_path: Path, arrays: dict[str, np.ndarray]
) -> None:
    np.savez(tmp_path / "spike_raster.npz", **arrays)
    inputs = read_inputs(tmp_path, {})
    assert inputs.raster is None
    assert "spike_raster.npz cannot be read" in inputs.problems["raster"]
