"""`make quickstart`: the whole main job at laptop size, each part a command a user would type."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any

from launch.compose import command
from launch.quickstart_plan import MOE_VARIANTS, VARIANTS, Part, QuickstartConfig, plan_parts
from launch.quickstart_record import Record, code_stamp
from parallel.backend.cpu import CpuBackend
from training.health import STOPPED

logger = logging.getLogger(__name__)


@command("quickstart", QuickstartConfig)
def main(config: QuickstartConfig) -> None:
    """Run the main job: text, a Transformer, its conversion, spikes, comparison, export, report.

    Every part is a command that could be typed by hand; each is printed before it runs and its
    output is kept in OUT/logs. An interrupted part is resumed, a complete one reused; a part whose
    command, inputs or code have changed since is done afresh.
    """
    out = config.folder
    (out / "logs").mkdir(parents=True, exist_ok=True)
    parts = list(plan_parts(config, out))
    record = Record.open(out, code_stamp(), parts)
    progress = _Progress([part.weight for part in parts])
    seconds: dict[str, float] = {}
    for index, part in enumerate(parts):
        if part.module == "report":
            write_summary(out, seconds)
        if not record.begin(part):
            progress.skip(index)
            logger.info("%s, done before", progress.line(index, part.name, 1.0))
        else:
            spent = _run(part, index, out / "logs" / f"{part.name}.log", progress)
            record.complete(part, spent)
        seconds[part.name] = record.seconds(part)
    summary = write_summary(out, seconds)
    for line in verdict(summary):
        logger.info("%s", line)
    logger.info("look at %s", out / "report.html")


class _Progress:
    """Where the job is and how long is left, from the parts' shares of the time."""

    def __init__(self, weights: list[float]) -> None:
        self._weights = weights
        self._started = time.monotonic()

    def skip(self, index: int) -> None:
        """A part that costs no time."""
        self._weights[index] = 0.0

    def line(self, index: int, name: str, share: float) -> str:
        """One line: part, share of it done, time so far, time left."""
        done = sum(self._weights[:index]) + share * self._weights[index]
        total = max(sum(self._weights), 1.0)
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
        RuntimeError: a part that failed, with the end of its output, or that was stopped.
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
    if part.output is not None and (part.output / STOPPED).exists():
        raise RuntimeError(f"{part.name} was stopped before its end. The same command goes on.")
    return round(time.monotonic() - begin, 1)


def _threads(part: Part) -> str:
    """Cores that we may use, shared fairly among the processes of a part."""
    return str(max(CpuBackend().num_devices() // part.num_processes, 1))


def write_summary(out: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """Collect the evaluations and the continued runs' last rows into `summary.json`."""
    results = {}
    for name in (*VARIANTS, *MOE_VARIANTS):
        path = out / "evaluations" / f"{name}.json"
        if name in VARIANTS or path.exists():
            results[name] = json.loads(path.read_text())
    rows = [json.loads(line) for line in (out / "continue" / "metrics.jsonl").open()]
    summary = {
        "perplexity": {name: result["perplexity"] for name, result in results.items()},
        "perplexity_beyond_window": {
            name: result["perplexity_beyond_window"] for name, result in results.items()
        },
        "sparsity": results["spiked"]["sparsity"],
        "tokens_per_second": sorted(row["tokens_per_second"] for row in rows)[len(rows) // 2],
        "tokens": {
            name: _tokens(out / name)
            for name in ("base", "control", "continue", "scratch", "moe_continue")
            if (out / name).is_dir()
        },
        "seconds": {**seconds, "total": round(sum(seconds.values()), 1)},
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
    if "moe_continued" in p:
        checks += [
            ("moe_continued <= 1.10 x control", p["moe_continued"] / p["control"], 1.10),
            ("moe_spiked <= 1.01 x moe_continued", p["moe_spiked"] / p["moe_continued"], 1.01),
        ]
    lines = ["perplexity: " + "  ".join(f"{name} {value:.2f}" for name, value in p.items())]
    for rule, ratio, limit in checks:
        word = "met" if math.isfinite(ratio) and ratio <= limit else "MISSED"
        lines.append(f"{rule}: {ratio:.3f} {word}")
    return lines


if __name__ == "__main__":
    main()
