"""How `launch.bench` compares: pairs run in turn, medians, one row a comparison."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from models.config import ModelConfig
from parallel.backend.base import Backend

Work = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Setting:
    """What to measure on, of which sizes, and how often; `long_repeats` is for rows of minutes."""

    backend: Backend
    device: torch.device
    model: ModelConfig
    dtype: torch.dtype
    short_tokens: int
    long_tokens: int
    prefill_tokens: int
    parallel_tokens: int
    recompute: bool
    repeats: int
    long_repeats: int


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison; `goal` is the largest good ratio. None where there is no such figure."""

    SIGN: ClassVar[str] = "<= "

    name: str
    ours: float
    baseline: float | None
    ratio: float | None
    unit: str
    goal: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the ratio is within the goal; None without one."""
        return None if self.goal is None or self.ratio is None else self.ratio <= self.goal

    def line(self) -> str:
        """One log line."""
        verdict = {None: "", True: "met", False: "MISSED"}[self.met]
        goal = "" if self.goal is None else f"  goal {self.SIGN}{self.goal:g}: {verdict}"
        baseline, ratio = _figure(self.baseline, ".4g"), _figure(self.ratio, ".3f")
        return f"{self.name:<52} {self.ours:10.4g} {baseline:>10} {self.unit:<8} {ratio:>8}{goal}"

    def markdown(self) -> str:
        """One table row."""
        verdict = {None: "", True: "yes", False: "no"}[self.met]
        baseline = "" if self.baseline is None else f"{self.baseline:.4g} {self.unit}"
        return (
            f"| {self.name} | {self.ours:.4g} {self.unit} | {baseline} | "
            f"{_figure(self.ratio, '.3f')} | {_figure(self.goal, 'g')} | {verdict} |"
        )


@dataclass(frozen=True, slots=True)
class ExactRow(Row):
    """A comparison of two counts that must be equal."""

    SIGN: ClassVar[str] = ""

    @property
    def met(self) -> bool | None:
        """Whether both are the same, to the last one."""
        return self.ours == self.baseline


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def seconds(work: Work, setting: Setting) -> float:
    """Wall time of one call, the device's queue included."""
    setting.backend.synchronize()
    start = time.perf_counter()
    work()
    setting.backend.synchronize()
    return time.perf_counter() - start


def median_seconds(work: Work, setting: Setting) -> float:
    """Median wall time, after one warm-up."""
    work()
    return statistics.median(seconds(work, setting) for _ in range(setting.repeats))


def paired(
    ours: Work, baseline: Work, setting: Setting, *, repeats: int | None = None
) -> tuple[float, float, float]:
    """Medians of both in seconds and the median ratio of pairs run in turn, after one warm-up."""
    ours()
    baseline()
    pairs = [
        (seconds(ours, setting), seconds(baseline, setting))
        for _ in range(repeats or setting.repeats)
    ]
    return (
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(a / b for a, b in pairs),
    )


def compare(  # noqa: PLR0913 - a row's figures
    name: str,
    ours: Work,
    baseline: Work,
    setting: Setting,
    *,
    goal: float | None = None,
    unit: str = "s",
    repeats: int | None = None,
) -> Row:
    """The row of one pair; `unit` is s or ms."""
    a, b, ratio = paired(ours, baseline, setting, repeats=repeats)
    scale = {"s": 1.0, "ms": 1e3}[unit]
    return Row(name, scale * a, scale * b, ratio, unit, goal)
