"""Figures of a report as inline SVG images: one look, labelled axes, nothing outside the page.

Owns the style and the training curves; figures about spikes are in `report_spike_figures`.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from launch.report_inputs import Floats

BLUE, ORANGE, GREEN, PURPLE = "#0060a0", "#c04a00", "#00704f", "#843a86"
INK, FAINT = "#1d2329", "#8a939c"
MAX_POINTS = 1500
SMOOTHED_FROM = 40

_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e7eb",
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.fonttype": "path",
    "svg.hashsalt": "synfire",
}


@dataclass(frozen=True, slots=True)
class Line:
    """One curve: steps, values, what it is; noisy ones get a moving average on top."""

    steps: Floats
    values: Floats
    label: str = ""
    color: str = BLUE
    is_markers: bool = False
    is_noisy: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    """How a curve panel is labelled; `marks` are vertical lines with a word at a step.

    `is_share` shows values as percentages; `cuts_start` lets the first twentieth of a long run
    leave the top of the panel, so that the rest can be read.
    """

    title: str
    unit: str
    marks: dict[str, float] = field(default_factory=dict)
    has_zero: bool = False
    is_share: bool = False
    cuts_start: bool = False


@contextmanager
def figure(width: float, height: float) -> Iterator[Figure]:
    """A figure in the report's style; `width` 9.2 inches is the whole page."""
    with mpl.rc_context(_STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def image(drawn: Figure, description: str) -> str:
    """Return `<img>` with the figure inside and its description as alternative text."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    quoted = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return f'<img src="data:image/svg+xml;base64,{data}" alt="{quoted}">'


def curves(lines: list[Line], axis: Axis, *, width: float = 9.2, height: float = 3.0) -> str:
    """Curves over optimizer steps. Long runs are averaged down to `MAX_POINTS` points."""
    with figure(width, height) as drawn:
        ax = drawn.subplots()
        for line in lines:
            _draw_line(ax, line)
        _draw_marks(ax, axis.marks)
        ax.set_title(axis.title)
        ax.set_xlabel("optimizer step")
        ax.set_ylabel(axis.unit)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=int(width * 1.2), integer=True))
        ax.yaxis.set_major_formatter(
            PercentFormatter(1.0, decimals=0) if axis.is_share else FuncFormatter(_tick)
        )
        if axis.cuts_start:
            _cut_start(ax, lines)
        if axis.has_zero:
            ax.set_ylim(bottom=0)
        elif axis.is_share:
            ax.set_ylim(*share_limits([value for line in lines for value in line.values]))
        if len(lines) > 2:
            drawn.legend(loc="outside lower center", ncols=len(lines))
        elif len(lines) == 2:
            ax.legend(loc="best")
        return image(drawn, f"{axis.title}: {axis.unit} over optimizer steps")


def share_limits(values: Sequence[float]) -> tuple[float, float]:
    """Axis limits around shares: a tenth wide at least, so that noise does not look like news."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    pad = max(0.08 * (high - low), (0.1 - (high - low)) / 2)
    return max(0.0, low - pad), min(1.0, high + pad) + 1e-3


def thin(steps: Floats, values: Floats) -> tuple[Floats, Floats]:
    """Average neighbouring points until at most `MAX_POINTS` are left."""
    if len(steps) <= MAX_POINTS:
        return steps, values
    parts = np.array_split(np.arange(len(steps)), MAX_POINTS)
    return (
        np.array([steps[part].mean() for part in parts]),
        np.array([values[part].mean() for part in parts]),
    )


def smooth(values: Floats) -> Floats:
    """Centred moving average over about a thirtieth of the run.

    It narrows towards the start, where a loss falls steeply, and is one-sided at the end.
    """
    half = max(2, len(values) // 60)
    index = np.arange(len(values))
    first = index - np.minimum(half, index)
    last = np.minimum(2 * index - first, len(values) - 1)
    total = np.concatenate([[0.0], np.cumsum(values)])
    return np.asarray((total[last + 1] - total[first]) / (last + 1 - first))


def _draw_line(ax: Any, line: Line) -> None:
    steps, values = thin(line.steps, line.values)
    if line.is_markers:
        marker = "o" if len(steps) <= 60 else None
        ax.plot(
            steps, values, color=line.color, marker=marker, markersize=4, label=line.label or None
        )
    elif not line.is_noisy or len(steps) < SMOOTHED_FROM:
        marker = "o" if len(steps) == 1 else None
        ax.plot(steps, values, color=line.color, marker=marker, label=line.label or None)
    else:
        ax.plot(steps, values, color=line.color, alpha=0.3, linewidth=0.9)
        ax.plot(steps, smooth(values), color=line.color, label=line.label or None)


def _cut_start(ax: Any, lines: list[Line]) -> None:
    """Fit the upper limit to what follows the first twentieth of each long curve."""
    if max(len(line.values) for line in lines) < SMOOTHED_FROM:
        return
    bottom, _ = ax.get_ylim()
    tops = [line.values[len(line.values) // 20 :].max() for line in lines]
    ax.set_ylim(bottom, bottom + 1.05 * (max(tops) - bottom))


def _draw_marks(ax: Any, marks: dict[str, float]) -> None:
    for word, step in marks.items():
        ax.axvline(step, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        ax.annotate(
            word, (step, 1.0), xycoords=("data", "axes fraction"), xytext=(4, -3),
            textcoords="offset points", va="top", fontsize=8,
        )  # fmt: skip


def _tick(value: float, _position: int) -> str:
    """Thousands with separators, small numbers as they are."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if value and abs(value) < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-")
    return f"{value:g}"
