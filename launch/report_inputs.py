"""What a report is made of: the files of a run folder, read so that nothing missing is an error.

A file that is absent or damaged leaves its field empty and a sentence in `problems` that names it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from omegaconf import OmegaConf

Floats = npt.NDArray[np.float64]
Row = dict[str, Any]

FILES = {
    "metrics": "metrics.jsonl",
    "evaluations": "eval.jsonl",
    "config": "config.yaml",
    "summary": "summary.json",
    "certificate": "certificate.json",
    "raster": "spike_raster.npz",
}
"""Every input and its name in a run folder; all are optional."""


@dataclass(frozen=True, slots=True)
class Raster:
    """Spike counts `[tokens, channels]` of one site for one sentence."""

    tokens: tuple[str, ...]
    counts: npt.NDArray[np.int64]
    site: str


@dataclass(frozen=True, slots=True)
class ReportInputs:
    """Everything that was found; empty where nothing was."""

    run_dir: Path
    metrics: list[Row] = field(default_factory=list)
    evaluations: list[Row] = field(default_factory=list)
    config: Row = field(default_factory=dict)
    summary: Row = field(default_factory=dict)
    certificate: Row = field(default_factory=dict)
    raster: Raster | None = None
    problems: dict[str, str] = field(default_factory=dict)

    def series(self, key: str) -> tuple[Floats, Floats]:
        """Steps and finite values of a `metrics.jsonl` key."""
        return series(self.metrics, key)

    def spike_rows(self) -> list[Row]:
        """The metrics rows that carry spike statistics."""
        return [row for row in self.metrics if any(key.startswith("spike/") for key in row)]

    def setting(self, path: str) -> Any:
        """A value of `config.yaml` by dotted name, None when it is not there."""
        value: Any = self.config
        for name in path.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        return value


def read_inputs(run_dir: Path, extra: Mapping[str, Path]) -> ReportInputs:
    """Read a run folder; `extra` names other places of some inputs (a file, or a folder with it).

    Raises:
        ValueError: no such run folder, or an input that a report does not have.
    """
    if not run_dir.is_dir():
        raise ValueError(
            f"run_dir ({run_dir}) must be a folder: got nothing there. Run launch.train first."
        )
    unknown = sorted(extra.keys() - FILES.keys())
    if unknown:
        raise ValueError(f"extra ({', '.join(unknown)}) must be among {', '.join(FILES)}.")
    problems: dict[str, str] = {}

    def load(name: str, parse: Callable[[Path], Any], empty: Any) -> Any:
        path = extra.get(name, run_dir)
        path = path / FILES[name] if path.is_dir() else path
        try:
            return parse(path)
        except FileNotFoundError:
            problems[name] = f"{path} does not exist."
        except Exception as error:  # a damaged file must not cost the rest of the page
            problems[name] = f"{path} cannot be read ({type(error).__name__}: {error})."
        return empty

    return ReportInputs(
        run_dir=run_dir,
        metrics=load("metrics", read_rows, []),
        evaluations=load("evaluations", read_rows, []),
        config=load("config", _read_yaml, {}),
        summary=load("summary", _read_object, {}),
        certificate=load("certificate", _read_object, {}),
        raster=load("raster", _read_raster, None),
        problems=problems,
    )


def read_rows(path: Path) -> list[Row]:
    """All whole JSON objects with a `step`; half a last line (a run being written) is left out."""
    rows = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        try:
            row = json.loads(line)
        except ValueError:
            if number == len(lines) - 1:
                break
            raise
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


def series(rows: list[Row], key: str) -> tuple[Floats, Floats]:
    """Steps and finite values of a key over rows."""
    pairs = [(row["step"], row[key]) for row in rows if is_number(row.get(key))]
    steps, values = zip(*pairs, strict=True) if pairs else ((), ())
    return np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_real and math.isfinite(value)


def by_site(row: Row, metric: str) -> dict[str, dict[int, float]]:
    """One spike metric of a metrics row as `{site: {layer: value}}`, layers ascending."""
    found: dict[str, dict[int, float]] = {}
    for key, value in row.items():
        parts = key.split("/")
        is_spike = len(parts) == 4 and parts[0] == "spike" and parts[1].isdigit()
        if is_spike and parts[3] == metric and is_number(value):
            found.setdefault(parts[2], {})[int(parts[1])] = float(value)
    return {site: dict(sorted(layers.items())) for site, layers in found.items()}


def site_mean(row: Row, metric: str) -> float | None:
    """Mean of a spike metric over all layers and sites, each counted once; None without any."""
    values = [v for layers in by_site(row, metric).values() for v in layers.values()]
    return sum(values) / len(values) if values else None


def _read_object(path: Path) -> Row:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"not a JSON object but {type(value).__name__}")
    return value


def _read_yaml(path: Path) -> Row:
    value = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    if not isinstance(value, dict):
        raise ValueError(f"not a mapping but {type(value).__name__}")
    return {str(key): item for key, item in value.items()}


def _read_raster(path: Path) -> Raster:
    with np.load(path, allow_pickle=False) as arrays:
        tokens = tuple(str(token) for token in arrays["tokens"])
        counts = np.rint(arrays["counts"]).astype(np.int64)
        site = str(arrays["site"]) if "site" in arrays else ""
    if counts.ndim != 2 or counts.shape[0] != len(tokens) or not counts.size:
        raise ValueError(f"counts {counts.shape} do not fit {len(tokens)} tokens")
    return Raster(tokens, counts, site)
