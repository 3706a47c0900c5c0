"""A run folder as one self-contained HTML page: no scripts, no links out, figures inside."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from launch import report_model_sections as models
from launch import report_sections as training
from launch import report_spike_sections as spiking
from launch.report_html import page
from launch.report_inputs import ReportInputs, read_inputs

SECTIONS: tuple[tuple[str, str, Callable[[ReportInputs], str]], ...] = (
    ("overview", "Overview", training.overview),
    ("what", "What ran", training.what_ran),
    ("models", "Base, converted, continued, spiked", models.comparison),
    ("loss", "Loss", training.loss),
    ("rate", "Learning rate", training.learning_rate),
    ("throughput", "Throughput", training.throughput),
    ("sparsity", "Firing rate and sparsity", spiking.sparsity),
    ("raster", "Spike raster", spiking.spike_raster),
    ("energy", "Energy estimate", spiking.energy),
    ("certificate", "Conversion certificate", models.certificate),
    ("sites", "All spike statistics", spiking.every_site),
)


def render_report(
    run_dir: Path, *, out: Path | None = None, extra: Mapping[str, Path] | None = None
) -> Path:
    """Write the report of a run folder and return its path.

    Args:
        run_dir: the run folder; `report_inputs.FILES` lists what is read from it, all optional.
        out: the page, by default `report.html` in the run folder; replaced as a whole.
        extra: other places for some inputs by name (`summary`, `certificate`, `raster`, ...): a
            file, or a folder that has the file.

    Raises:
        ValueError: no such run folder, or an unknown name in `extra`.
        OSError: the page cannot be written.
    """
    inputs = read_inputs(run_dir, extra or {})
    target = run_dir / "report.html" if out is None else out
    name = inputs.setting("experiment") or run_dir.resolve().name
    steps = f"{inputs.metrics[-1]['step']:,} optimizer steps" if inputs.metrics else "no steps yet"
    sections = [(anchor, heading, build(inputs)) for anchor, heading, build in SECTIONS]
    text = page(f"Synfire: {name}", f"{steps}, from {run_dir}", sections)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, target)
    return target
