"""`make quickstart`: the whole main job at laptop size, each part a command a user would type."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

from launch.compose import command
from parallel.backend.detect import detect
from parallel.config import BackendName
from training.config import STRICT

logger = logging.getLogger(__name__)


class Size(Enum):
    """`full` is the real thing; `ci` only shows that every part runs."""

    full = "full"
    ci = "ci"


@dataclass(frozen=True, kw_only=True, slots=True)
class QuickstartConfig:
    """Where it goes, how long it trains, on what.

    `out` null: a folder of its own for each size. `num_processes` null: two, or one where there is
    one device.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    size: Size = Size.full
    out: str | None = None
    num_processes: int | None = None
    backend: BackendName = BackendName.auto

    def __post_init__(self) -> None:
        if self.num_processes is not None and self.num_processes < 1:
            raise ValueError(f"num_processes ({self.num_processes}) must be at least 1, or null.")

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        own = {Size.full: "outputs/quickstart", Size.ci: "outputs/quickstart_ci"}
        return Path(self.out or own[self.size])


@dataclass(frozen=True, slots=True)
class Part:
    """One command; `weight` is its share of the time, from a measured run."""

    name: str
    module: str
    arguments: tuple[str, ...]
    weight: float
    num_processes: int = 1

    def argv(self) -> list[str]:
        """The command line."""
        python = [sys.executable]
        if self.num_processes > 1:
            python += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                       str(self.num_processes)]  # fmt: skip
        return [*python, "-m", f"launch.{self.module}", *self.arguments]


VARIANTS = ("base", "control", "scratch", "converted", "continued", "spiked")
WINDOW_TOKENS = 64


@command("quickstart", QuickstartConfig)
def main(config: QuickstartConfig) -> None:
    """Run the main job: text, a Transformer, its conversion, spikes, comparison, export, report.

    Every part is a command that could be typed by hand; each is printed before it runs and its
    output is kept in OUT/logs. A part that is already complete is resumed or reused.
    """
    out = config.folder
    (out / "logs").mkdir(parents=True, exist_ok=True)
    parts = list(plan_parts(config, out))
    progress = _Progress([part.weight for part in parts])
    seconds: dict[str, float] = {}
    for index, part in enumerate(parts):
        if part.module == "report":
            write_summary(out, {**seconds, "total": progress.elapsed()})
        seconds[part.name] = _run(part, index, out / "logs" / f"{part.name}.log", progress)
    summary = write_summary(out, {**seconds, "total": progress.elapsed()})
    for line in verdict(summary):
        logger.info("%s", line)
    logger.info("look at %s", out / "report.html")


def plan_parts(config: QuickstartConfig, out: Path) -> Iterator[Part]:
    """Every command of the quickstart, in order."""
    ci = config.size is Size.ci
    data = f"data.path={out / 'data'}"
    steps = ("training.max_steps=8", "checkpoint.interval_steps=8") if ci else ()
    ranks = config.num_processes or min(2, detect(config.backend).num_devices())
    backend = f"backend={config.backend.value}"
    text = ("max_bytes=1000000",) if ci else ()
    yield Part("prepare", "prepare", (f"out={out / 'data'}", "vocab_size=2048", *text), 11)

    def train(name: str, experiment: str, weight: float, *more: str) -> Part:
        arguments = (
            f"experiment={experiment}",
            f"run_dir={out / name}",
            data,
            backend,
            *steps,
            *more,
        )
        return Part(name, "train", arguments, weight, ranks)

    yield train("base", "quickstart_base", 137)
    yield Part("base_export", "export", (f"checkpoint={out / 'base'}", f"out={out / 'base_hf'}"), 4)
    yield Part(
        "convert", "convert",
        (f"source={out / 'base_hf'}", f"out={out / 'converted'}", "mixers=[L S]*2",
         f"window_tokens={WINDOW_TOKENS}", f"text={out / 'data'}",
         f"align.tokens={8192 if ci else 131072}"),
        10,
    )  # fmt: skip
    yield train("control", "quickstart_control", 56, f"init.checkpoint={out / 'base_hf'}")
    half = ("spiking.start_step=4",) if ci else ()
    converted = f"init.checkpoint={out / 'converted'}"
    yield train("continue", "quickstart_continue", 60, converted, *half)
    yield train("scratch", "quickstart_scratch", 59, *half)
    yield from _evaluations(out, backend, rows=4 if ci else 64)
    exported = (f"checkpoint={out / 'continue'}", f"out={out / 'gla_swa'}", "format=gla_swa")
    yield Part("export", "export", exported, 4)
    yield Part(
        "generate", "generate",
        (f"checkpoint={out / 'continue'}", "prompt='def read(path):'", "max_new_tokens=64",
         backend),
        3,
    )  # fmt: skip
    yield Part(
        "report", "report",
        (f"run_dir={out / 'continue'}", f"out={out / 'report.html'}",
         f"summary={out / 'summary.json'}", f"certificate={out / 'converted'}"), 5,
    )  # fmt: skip


def _evaluations(out: Path, backend: str, *, rows: int) -> Iterator[Part]:
    """The same held-out rows through all six models."""
    sources = {
        "base": ("base_hf", "off"), "control": ("control", "off"), "scratch": ("scratch", "off"),
        "converted": ("converted", "off"), "continued": ("continue", "off"),
        "spiked": ("continue", "adaptive"),
    }  # fmt: skip
    for name in VARIANTS:
        folder, spiking = sources[name]
        arguments = (
            f"checkpoint={out / folder}", f"data.path={out / 'data'}", f"rows={rows}",
            "sequence_length=256", f"window_tokens={WINDOW_TOKENS}", f"spiking={spiking}",
            f"out={out / 'evaluations' / f'{name}.json'}", backend,
        )  # fmt: skip
        yield Part(f"evaluate_{name}", "evaluate", arguments, 3)


class _Progress:
    """Where the job is and how long is left, from the parts' shares of the time."""

    def __init__(self, weights: list[float]) -> None:
        self._weights = weights
        self._started = time.monotonic()

    def elapsed(self) -> float:
        """Seconds since the start."""
        return round(time.monotonic() - self._started, 1)

    def line(self, index: int, name: str, share: float) -> str:
        """One line: part, share of it done, time so far, time left."""
        done = sum(self._weights[:index]) + share * self._weights[index]
        total = sum(self._weights)
        elapsed = time.monotonic() - self._started
        # The shares were measured on 2 cores; before there is evidence, believe them as seconds.
        speed = elapsed / done if done > 0.05 * total else 1.0
        left = speed * (total - done)
        return (
            f"[{index + 1}/{len(self._weights)}] {name:<20} {100 * share:3.0f} %   "
            f"{_clock(elapsed)} gone, about {_clock(left)} left"
        )


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}m{int(seconds) % 60:02d}s"


def _run(part: Part, index: int, log: Path, progress: _Progress) -> float:
    """Run one part, its output in `log`; returns its seconds.

    Raises:
        RuntimeError: a part that failed, with the end of its output.
    """
    begin = time.monotonic()
    argv = part.argv()
    logger.info("%s", progress.line(index, part.name, 0.0))
    environment = {**os.environ, "OMP_NUM_THREADS": _threads(part)}
    with log.open("w") as sink:
        sink.write(f"$ {shlex.join(['python', *argv[1:]])}\n")
        sink.flush()
        process = subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        assert process.stdout is not None
        for line in process.stdout:
            sink.write(line)
            sink.flush()
            found = re.search(r"step (\d+)/(\d+)", line)
            if found:
                share = int(found[1]) / max(int(found[2]), 1)
                logger.info("%s   %s", progress.line(index, part.name, share), line.strip()[:90])
        status = process.wait()
    if status != 0:
        tail = "".join(log.read_text().splitlines(keepends=True)[-15:])
        raise RuntimeError(f"{part.name} ended with status {status}. The end of {log}:\n{tail}")
    return round(time.monotonic() - begin, 1)


def _threads(part: Part) -> str:
    """Cores shared fairly among the processes of a part."""
    return str(max((os.cpu_count() or 1) // part.num_processes, 1))


def write_summary(out: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """Collect the evaluations and the continued run's last rows into `summary.json`."""
    results = {
        name: json.loads((out / "evaluations" / f"{name}.json").read_text()) for name in VARIANTS
    }
    rows = [json.loads(line) for line in (out / "continue" / "metrics.jsonl").open()]
    summary = {
        "perplexity": {name: results[name]["perplexity"] for name in VARIANTS},
        "perplexity_beyond_window": {
            name: results[name]["perplexity_beyond_window"] for name in VARIANTS
        },
        "sparsity": results["spiked"]["sparsity"],
        "tokens_per_second": sorted(row["tokens_per_second"] for row in rows)[len(rows) // 2],
        "tokens": {
            name: _tokens(out / name) for name in ("base", "control", "continue", "scratch")
        },
        "seconds": seconds,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def _tokens(run_dir: Path) -> int:
    """Tokens that a run has seen, from its last metrics row."""
    return int(json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["tokens"])


def verdict(summary: dict[str, Any]) -> list[str]:
    """The quickstart's criteria against the measured perplexities, one line each."""
    p = summary["perplexity"]
    checks = [
        ("converted <= 5 x base", p["converted"] / p["base"], 5.0),
        ("continued <= 1.10 x control", p["continued"] / p["control"], 1.10),
        ("continued <= 0.85 x scratch", p["continued"] / p["scratch"], 0.85),
        ("spiked <= 1.01 x continued", p["spiked"] / p["continued"], 1.01),
    ]
    lines = ["perplexity: " + "  ".join(f"{name} {p[name]:.2f}" for name in VARIANTS)]
    for rule, ratio, limit in checks:
        word = "met" if math.isfinite(ratio) and ratio <= limit else "MISSED"
        lines.append(f"{rule}: {ratio:.3f} {word}")
    return lines


if __name__ == "__main__":
    main()
