"""`python -m launch.plan`: memory, communication and speed of a run before it is paid for."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

from launch.compose import command
from launch.model_source import model_from_checkpoint
from launch.plan_run import PlannedRun, plan_run, wanted_devices
from launch.plan_search import replaced_keys, search
from launch.plan_stage import PlannedStage
from launch.plan_text import describe, found_lines, header_lines, stage_lines
from models.strict import STRICT
from parallel.backend.devices import Device, DeviceName, device_facts
from training.config import RunConfig
from training.planned_job import left_out


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOptions:
    """For which devices, and whether to look for the fastest layouts.

    `num_devices` null is what the layout asks for. `search` finds the `top` fastest layouts of so
    many devices instead of planning the given one.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    device: DeviceName = DeviceName.h100
    num_devices: int | None = None
    search: bool = False
    top: int = 5

    def __post_init__(self) -> None:
        if self.num_devices is not None and self.num_devices < 1:
            raise ValueError(
                f"plan.num_devices ({self.num_devices}) must be at least 1, or null for what the "
                "layout asks for."
            )
        if self.top < 1:
            raise ValueError(f"plan.top ({self.top}) must be at least 1.")
        if self.search and self.num_devices is None:
            raise ValueError(
                "plan.search (true) must come with plan.num_devices: layouts are tried for so many "
                "devices. Set plan.num_devices, or plan.search=false."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig(RunConfig):
    """A run as `launch.train` takes it, the devices it is planned for, and where JSON goes."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    plan: PlanOptions = field(default_factory=PlanOptions)
    out: str | None = None


@command("plan", PlanConfig, resolve=model_from_checkpoint)
def main(config: PlanConfig) -> None:
    """Plan a run: parameters, memory, communication, FLOPs and predicted tokens/s of each stage.

    Takes every argument of launch.train ('~stages.NAME' leaves a stage out). plan.device=h100|h200|
    a100|c550|cpu says on what, plan.num_devices=N on how many (the layout's own number when it is
    null); with plan.search=true the plan.top layouts on which N devices take least time for all
    stages, and why others cannot be. out=FILE writes JSON. Nothing is loaded or started.
    """
    _check_out(config.out)
    device = device_facts(config.plan.device)
    if config.plan.search:
        lines, record = _searched(config, device)
    else:
        lines, record = _planned(config, device)
    sys.stdout.write("\n".join(lines) + "\n")
    if config.out is not None:
        path = Path(config.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _check_out(out: str | None) -> None:
    """Before the work, not after it."""
    if out is not None and Path(out).is_dir():
        raise ValueError(f"out ({out}) must be a file: got a folder. Set out={out}/plan.json.")


def _planned(config: PlanConfig, device: Device) -> tuple[list[str], dict[str, Any]]:
    """The given layout, stage by stage."""
    num_devices = config.plan.num_devices or wanted_devices(config.parallel)
    run = plan_run(config, device, num_devices).timed()
    lines = [*header_lines(config, device, num_devices)]
    for stage in run.stages:
        lines += ["", *stage_lines(stage)]
    return lines, {**_record(config, device), **_record_of_run(run)}


def _searched(config: PlanConfig, device: Device) -> tuple[list[str], dict[str, Any]]:
    """The layouts on which the run takes least time."""
    assert config.plan.num_devices is not None, "checked with the options"
    found = search(config, device, config.plan.num_devices, config.plan.top)
    lines = [*header_lines(config, device, config.plan.num_devices)]
    replaced = replaced_keys(config)
    if replaced:
        lines.append(f"  the search replaces {', '.join(replaced)}")
    lines += ["", *found_lines(found)]
    return lines, {
        **_record(config, device),
        "replaced": replaced,
        "best": [_record_of_run(run) for run in found.best],
        "num_tried": found.num_tried,
        "refused": [{"reason": reason, "count": count} for reason, count in found.refused],
    }


def _record(config: PlanConfig, device: Device) -> dict[str, Any]:
    """What is planned, as JSON values."""
    return {"device": _device(device), "left_out": left_out(config)}


def _record_of_run(run: PlannedRun) -> dict[str, Any]:
    layout = run.first.layout
    return {
        "layout": {
            "description": describe(run.first),
            "pp": layout.pp, "dp_replicate": layout.dp_replicate, "dp_shard": layout.dp_shard,
            "tp": layout.tp, "ep": layout.ep,
        },
        "pipeline_stages": [asdict(stage) for stage in run.first.given.stages],
        "peak_bytes": run.peak_bytes,
        "usable_bytes": run.first.usable_bytes,
        "fits": run.fits,
        "seconds": run.seconds,
        "stages": [_record_of_stage(stage) for stage in run.stages],
    }  # fmt: skip


def _record_of_stage(planned: PlannedStage) -> dict[str, Any]:
    return {
        "stage": planned.name,
        "num_steps": planned.num_steps,
        "num_microbatches": planned.layout.num_microbatches(planned.job),
        "memory": [asdict(each) for each in planned.memory],
        "peak_bytes": planned.peak_bytes,
        "fits": planned.fits,
        "traffic": [
            [asdict(each, dict_factory=_plain) for each in rank] for rank in planned.traffic
        ],
        "time": None if planned.time is None else asdict(planned.time),
    }


def _device(device: Device) -> dict[str, Any]:
    left_out = ("peak_flops",)
    facts = {name: getattr(device, name) for name in Device.__slots__ if name not in left_out}
    return _plain(list(facts.items()))


def _plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """Enum members by their values."""
    return {key: value.value if isinstance(value, Enum) else value for key, value in items}


if __name__ == "__main__":
    main()
