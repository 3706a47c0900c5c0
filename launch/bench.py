"""`python -m launch.bench`: speed as ratios within one run. Never a test: it measures."""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import TypeAdapter

from launch import (
    bench_checkpoint,
    bench_device_suites,
    bench_experts,
    bench_parallel,
    bench_suites,
)
from launch.bench_engine import ROWS
from launch.bench_rows import Row, Setting
from launch.compose import command
from models.config import ModelConfig
from parallel.backend.base import Backend
from parallel.backend.detect import detect
from parallel.config import BackendName, Precision
from training.config import STRICT
from training.engine_setup import DTYPES

logger = logging.getLogger(__name__)


SUITES: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "kernels": bench_suites.kernels,
    "step": bench_suites.step,
    "spiking": bench_suites.spiking,
    "recompute": bench_suites.recompute,
    "prefill": bench_suites.prefill_suite,
    "decode": bench_suites.decode,
    "ceilings": bench_device_suites.ceilings,
    "neuron": bench_device_suites.neuron,
    "block": bench_device_suites.block,
    "parallel": bench_parallel.parallel,
    "checkpoint": bench_checkpoint.checkpoint,
    "moe": bench_experts.moe,
}


class Suite(Enum):
    """What is measured; `all` is every suite in turn."""

    all = "all"
    kernels = "kernels"
    step = "step"
    spiking = "spiking"
    recompute = "recompute"
    prefill = "prefill"
    decode = "decode"
    ceilings = "ceilings"
    neuron = "neuron"
    block = "block"
    parallel = "parallel"
    checkpoint = "checkpoint"
    moe = "moe"


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchConfig:
    """Which rows, of which sizes, how often each pair is run, and where the JSON goes.

    `parallel_tokens` are those of a step on all ranks of suites parallel and checkpoint.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    model: ModelConfig
    suite: Suite = Suite.all
    out: str = "outputs/bench/bench.json"
    precision: Precision = Precision.fp32
    short_tokens: int = 4096
    long_tokens: int = 16_384
    prefill_tokens: int = 32_768
    parallel_tokens: int = 1024
    recompute: bool = False
    repeats: int = 5
    long_repeats: int = 1
    num_threads: int | None = None
    backend: BackendName = BackendName.auto

    def __post_init__(self) -> None:
        for name in ("repeats", "long_repeats", "short_tokens", "prefill_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1.")
        if self.parallel_tokens < 1 or self.parallel_tokens % ROWS:
            below = max(1, self.parallel_tokens // ROWS) * ROWS
            raise ValueError(
                f"parallel_tokens ({self.parallel_tokens}) must be a multiple of the rows of a "
                f"step: got {ROWS}. Set it to {below}."
            )
        if self.long_tokens <= self.short_tokens:
            raise ValueError(
                f"long_tokens ({self.long_tokens}) must be above short_tokens: got "
                f"{self.short_tokens}. Growth is measured between the two."
            )


@command("bench", BenchConfig)
def main(config: BenchConfig) -> None:
    """Measure kernels, training steps, prefill and decode beside a baseline in the same run.

    `model=NAME` with `precision`, `short_tokens` and `long_tokens` takes the sizes of any preset;
    ceilings, neuron and block hold the parts of a step against what the device does at best,
    parallel each layout of 2 and 4 ranks against one process, and what it sends against the plan,
    checkpoint saves beside training against saves that hold it, both in steps of `parallel_tokens`,
    moe experts against a dense layer of equal active FLOPs, and under ep 2.

    Rows are name, ours, baseline, ratio (ours / baseline), unit, goal (the largest ratio that is
    good enough) and met. Pairs run in turn; figures are medians.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    logging.getLogger("training").setLevel(logging.WARNING)
    backend = detect(config.backend)
    say_what_is_not_set(backend)
    setting = Setting(
        backend=backend, device=backend.device(0), model=config.model,
        dtype=DTYPES[config.precision], short_tokens=config.short_tokens,
        long_tokens=config.long_tokens, prefill_tokens=config.prefill_tokens,
        parallel_tokens=config.parallel_tokens, recompute=config.recompute,
        repeats=config.repeats, long_repeats=config.long_repeats,
    )  # fmt: skip
    names = list(SUITES) if config.suite is Suite.all else [config.suite.value]
    rows: list[Row] = []
    for name in names:
        for row in SUITES[name](setting):
            logger.info("%s", row.line())
            rows.append(row)
    write_rows(rows, Path(config.out), setting)
    verdicts = [row.met for row in rows if row.met is not None]
    logger.info(
        "%d rows, %d of %d goals met: %s", len(rows), sum(verdicts), len(verdicts), config.out
    )


def say_what_is_not_set(backend: Backend) -> None:
    """Rows with large tensors are slower without some of what launch scripts export."""
    proposed = backend.proposed_environment()
    missing = [f"{name}={value}" for name, value in proposed.items() if name not in os.environ]
    if missing:
        logger.info("not set, though launch scripts export it: %s", " ".join(missing))


def write_rows(rows: list[Row], out: Path, setting: Setting) -> None:
    """Write the rows as a JSON list, with the machine beside them in the same folder."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps([{**asdict(row), "met": row.met} for row in rows], indent=1) + "\n")
    machine = {
        "torch": torch.__version__, "python": platform.python_version(),
        "threads": torch.get_num_threads(), "processor": platform.processor() or platform.machine(),
        "vendor": setting.backend.vendor, "precision": str(setting.dtype).removeprefix("torch."),
        "kernels": [asdict(choice) for choice in setting.backend.kernel_choices()],
        "environment": {
            name: os.environ.get(name) for name in setting.backend.proposed_environment()
        },
        "peak_memory_bytes": setting.backend.memory().peak_bytes,
        "model": TypeAdapter(ModelConfig).dump_python(setting.model, mode="json"),
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
