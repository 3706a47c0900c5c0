"""The quickstart as a list of commands: what it is given and what each part runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

from parallel.backend.detect import detect
from parallel.config import BackendName
from training.config import STRICT


class Size(Enum):
    """`full` is the real thing; `ci` only shows that every part runs."""

    full = "full"
    ci = "ci"


class Target(Enum):
    """What the base becomes: a hybrid, or besides it one with parallel branches and experts."""

    hybrid = "hybrid"
    moe = "moe"


@dataclass(frozen=True, kw_only=True, slots=True)
class QuickstartConfig:
    """Where it goes, how long it trains, on what.

    `out` null: a folder of its own for each size. `num_processes` null: two, or one where there is
    one device. With `teacher` the continuation also learns from the base that was converted. With
    `target=moe` the base is converted to `spikingbrain_nano_moe` too, and that one trained on.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    size: Size = Size.full
    out: str | None = None
    num_processes: int | None = None
    backend: BackendName = BackendName.auto
    teacher: bool = False
    target: Target = Target.hybrid

    def __post_init__(self) -> None:
        if self.num_processes is not None and self.num_processes < 1:
            raise ValueError(f"num_processes ({self.num_processes}) must be at least 1, or null.")

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        own = {Size.full: "outputs/quickstart", Size.ci: "outputs/quickstart_ci"}
        return Path(self.out or own[self.size] + "_teacher" * self.teacher)


@dataclass(frozen=True, slots=True)
class Part:
    """One command and what it writes; `weight` is its share of the time, from a measured run."""

    name: str
    module: str
    arguments: tuple[str, ...]
    weight: float
    output: Path | None = None
    num_processes: int = 1

    def argv(self) -> list[str]:
        """The command line."""
        python = [sys.executable]
        if self.num_processes > 1:
            python += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                       str(self.num_processes)]  # fmt: skip
        return [*python, "-m", f"launch.{self.module}", *self.arguments]


Evaluations = dict[str, tuple[str, str]]
"""A variant's checkpoint and the spikes that it is evaluated with."""
VARIANTS: Evaluations = {
    "base": ("base_hf", "off"),
    "control": ("control", "off"),
    "scratch": ("scratch", "off"),
    "converted": ("converted", "off"),
    "continued": ("continue", "off"),
    "spiked": ("continue", "adaptive"),
}
MOE_VARIANTS: Evaluations = {
    "moe_converted": ("moe_converted", "off"),
    "moe_continued": ("moe_continue", "off"),
    "moe_spiked": ("moe_continue", "adaptive"),
}
WINDOW_TOKENS = 64
KL = 0.3
"""Weight of the divergence from the teacher, where there is one (LOG.md)."""


def plan_parts(config: QuickstartConfig, out: Path) -> Iterator[Part]:
    """Every command of the quickstart, in order."""
    ci = config.size is Size.ci
    prepared, base_hf = out / "data", out / "base_hf"
    data = f"data.path={prepared}"
    steps = ("training.max_steps=8", "checkpoint.interval_steps=8") if ci else ()
    ranks = config.num_processes or min(2, detect(config.backend).num_devices())
    backend = f"backend={config.backend.value}"
    text = ("max_bytes=1000000",) if ci else ()
    arguments = (f"out={prepared}", "vocab_size=2048", *text)
    yield Part("prepare", "prepare", arguments, 12, prepared)

    def train(name: str, experiment: str, weight: float, *more: str) -> Part:
        where = (f"experiment={experiment}", f"run_dir={out / name}", data, backend)
        arguments = (*where, *steps, *more)
        return Part(name, "train", arguments, weight, out / name, ranks)

    yield train("base", "quickstart_base", 137)
    yield Part(
        "base_export", "export", (f"checkpoint={out / 'base'}", f"out={base_hf}"), 4, base_hf
    )
    yield Part(
        "convert", "convert",
        (f"source={base_hf}", f"out={out / 'converted'}", "mixers=[L S]*2",
         f"window_tokens={WINDOW_TOKENS}", f"text={prepared}",
         f"align.tokens={8192 if ci else 131072}"),
        12, out / "converted",
    )  # fmt: skip
    yield train("control", "quickstart_control", 56, f"init.checkpoint={base_hf}")
    half = ("spiking.start_step=4",) if ci else ()
    converted = f"init.checkpoint={out / 'converted'}"
    learned = (f"training.teacher={base_hf}", f"distill.kl={KL}") if config.teacher else ()
    yield train("continue", "quickstart_continue", 60, converted, *half, *learned)
    yield train("scratch", "quickstart_scratch", 59, *half)
    rows = 4 if ci else 64
    yield from _evaluations(VARIANTS, out, backend, rows=rows)
    exported = (f"checkpoint={out / 'continue'}", f"out={out / 'gla_swa'}", "format=gla_swa")
    yield Part("export", "export", exported, 4, out / "gla_swa")
    yield Part(
        "generate", "generate",
        (f"checkpoint={out / 'continue'}", "prompt='def read(path):'", "max_new_tokens=64",
         backend),
        3,
    )  # fmt: skip
    if config.target is Target.moe:
        upcycled = out / "moe_converted"
        yield Part(
            "moe_convert", "convert",
            (f"source={base_hf}", f"out={upcycled}", "model=spikingbrain_nano_moe",
             f"text={prepared}"),
            12, upcycled,
        )  # fmt: skip
        yield train(
            "moe_continue", "spikingbrain_nano_moe", 150, f"init.checkpoint={upcycled}", *half
        )
        yield from _evaluations(MOE_VARIANTS, out, backend, rows=rows)
    yield Part(
        "report", "report",
        (f"run_dir={out / 'continue'}", f"out={out / 'report.html'}",
         f"summary={out / 'summary.json'}", f"certificate={out / 'converted'}"), 5,
        out / "report.html",
    )  # fmt: skip


def _evaluations(variants: Evaluations, out: Path, backend: str, *, rows: int) -> Iterator[Part]:
    """The same held-out rows through all models."""
    for name, (folder, spiking) in variants.items():
        result = out / "evaluations" / f"{name}.json"
        arguments = (
            f"checkpoint={out / folder}", f"data.path={out / 'data'}", f"rows={rows}",
            "sequence_length=256", f"window_tokens={WINDOW_TOKENS}", f"spiking={spiking}",
            f"out={result}", backend,
        )  # fmt: skip
        yield Part(f"evaluate_{name}", "evaluate", arguments, 3, result)
