"""`python -m launch.bench`: speed as ratios within one run. Never a test: it measures."""

from __future__ import annotations

import json
import logging
import platform
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

import torch

from launch.bench_suites import SUITES, Row, Setting
from launch.compose import command
from parallel.backend.detect import detect
from parallel.config import BackendName
from training.config import STRICT

logger = logging.getLogger(__name__)


class Suite(Enum):
    """What is measured; `all` is every suite in turn."""

    all = "all"
    kernels = "kernels"
    step = "step"
    spiking = "spiking"
    prefill = "prefill"
    decode = "decode"


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchConfig:
    """Which rows, how often each pair is run, and where the JSON goes."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    suite: Suite = Suite.all
    out: str = "outputs/bench/bench.json"
    repeats: int = 5
    long_repeats: int = 1
    num_threads: int | None = None
    backend: BackendName = BackendName.auto

    def __post_init__(self) -> None:
        for name in ("repeats", "long_repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1.")


@command("bench", BenchConfig)
def main(config: BenchConfig) -> None:
    """Measure kernels, training steps, prefill and decode beside a baseline in the same run.

    Rows are name, ours, baseline, ratio (ours / baseline), unit, goal (the largest ratio that is
    good enough) and met. Pairs run in turn; figures are medians.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    backend = detect(config.backend)
    setting = Setting(backend.device(0), backend.kernels(), config.repeats, config.long_repeats)
    names = list(SUITES) if config.suite is Suite.all else [config.suite.value]
    rows: list[Row] = []
    for name in names:
        for row in SUITES[name](setting):
            logger.info("%s", row.line())
            rows.append(row)
    write_rows(rows, Path(config.out))
    logger.info(
        "%d rows, %d met their goal: %s", len(rows), sum(r.met is True for r in rows), config.out
    )


def write_rows(rows: list[Row], out: Path) -> None:
    """Write the rows as a JSON list, with the machine beside them in the same folder."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps([{**asdict(row), "met": row.met} for row in rows], indent=1) + "\n")
    machine = {
        "torch": torch.__version__, "python": platform.python_version(),
        "threads": torch.get_num_threads(), "processor": platform.processor() or platform.machine(),
    }  # fmt: skip
    out.with_suffix(".machine.json").write_text(json.dumps(machine, indent=1) + "\n")
    table = [
        "| row | ours | baseline | ratio | goal | met |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    table += [row.markdown() for row in rows]
    out.with_suffix(".md").write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
