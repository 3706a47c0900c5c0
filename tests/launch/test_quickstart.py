"""The quickstart's plan, verdict and progress; `.ci/run` runs the parts themselves."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from launch.compose import compose_mapping, load_config
from launch.quickstart import _Progress, _run, verdict, write_summary
from launch.quickstart_plan import (
    MOE_VARIANTS,
    VARIANTS,
    Part,
    QuickstartConfig,
    Size,
    Target,
    plan_parts,
)
from launch.quickstart_record import Record, code_stamp
from parallel.backend.cpu import CpuBackend
from parallel.config import BackendName
from training.config import RunConfig

CONFIG_NAMES = {
    "prepare": "launch.prepare.PrepareConfig",
    "convert": "launch.convert_config.ConvertConfig",
    "export": "launch.export.ExportConfig",
    "evaluate": "launch.evaluate.EvaluateConfig",
    "generate": "launch.generate.GenerateConfig",
    "report": "launch.report.ReportConfig",
}


QUICK = [(Size.full, True), (Size.ci, False)]
SLOW = [
    pytest.param(*each, marks=pytest.mark.slow) for each in [(Size.full, False), (Size.ci, True)]
]


@pytest.mark.parametrize(("size", "teacher"), [*QUICK, *SLOW])
@pytest.mark.parametrize("target", list(Target))
def test_every_part_is_a_command_line_that_composes(
    tmp_path: Path, size: Size, target: Target, teacher: bool
) -> None:
    parts = list(plan_parts(QuickstartConfig(size=size, target=target, teacher=teacher), tmp_path))
    assert len({part.name for part in parts}) == len(parts)
    for part in parts:
        arguments = list(part.arguments)
        if part.module == "train":
            composed = compose_mapping("train", RunConfig, arguments)
            assert composed["run_dir"] == str(tmp_path / part.name)
        else:
            module, name = CONFIG_NAMES[part.module].rsplit(".", 1)
            load_config(part.module, getattr(importlib.import_module(module), name), arguments)


def test_two_processes_where_there_are_two_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ranks(**keys: Any) -> set[int]:
        parts = plan_parts(QuickstartConfig(**keys), tmp_path)
        return {part.num_processes for part in parts if part.module == "train"}

    for devices, expected in ((1, 1), (2, 2), (8, 2)):
        monkeypatch.setattr(CpuBackend, "num_devices", lambda self, n=devices: n)
        assert ranks(backend=BackendName.cpu) == {expected}
    assert ranks(backend=BackendName.cpu, num_processes=3) == {3}
    with pytest.raises(ValueError, match=r"num_processes \(0\) must be at least 1"):
        ranks(num_processes=0)


def test_every_part_that_computes_runs_on_the_chosen_backend(tmp_path: Path) -> None:
    for part in plan_parts(QuickstartConfig(backend=BackendName.cpu), tmp_path):
        expected = part.module in ("train", "evaluate", "generate")
        assert ("backend=cpu" in part.arguments) is expected


def test_each_size_has_a_folder_of_its_own() -> None:
    folders = [QuickstartConfig(size=size).folder for size in Size]
    assert len(set(folders)) == len(Size)
    assert Path("outputs/quickstart") in folders
    assert QuickstartConfig(out="elsewhere").folder == Path("elsewhere")


def test_control_continued_and_scratch_see_the_same_samples(tmp_path: Path) -> None:
    config = QuickstartConfig(target=Target.moe)
    parts = {part.name: part for part in plan_parts(config, tmp_path)}
    seen = []
    for name in ("control", "continue", "scratch", "moe_continue"):
        composed = compose_mapping("train", RunConfig, list(parts[name].arguments))
        seen.append({key: composed[key] for key in ("seed", "stages", "data", "schedule")})
    assert seen[0] == seen[1] == seen[2] == seen[3]


def test_the_second_model_comes_after_all_of_the_first(tmp_path: Path) -> None:
    """So that what is there already stays."""
    first = list(plan_parts(QuickstartConfig(), tmp_path))
    both = list(plan_parts(QuickstartConfig(target=Target.moe), tmp_path))
    assert both[: len(first) - 1] == first[:-1]
    assert both[-1] == first[-1]
    evaluated = [part.name for part in both[len(first) - 1 : -1] if part.module == "evaluate"]
    assert evaluated == [f"evaluate_{name}" for name in MOE_VARIANTS]


def test_spikes_begin_half_way(tmp_path: Path) -> None:
    for size in Size:
        for part in plan_parts(QuickstartConfig(size=size, target=Target.moe), tmp_path):
            if part.name not in ("continue", "scratch", "moe_continue"):
                continue
            composed = compose_mapping("train", RunConfig, list(part.arguments))
            steps = composed["training"]["max_steps"] or composed["stages"]["continue"]["steps"]
            assert composed["spiking"]["neuron"] == "adaptive"
            assert composed["spiking"]["start_step"] * 2 == steps


def perplexities(**changed: float) -> dict[str, Any]:
    good = {
        "base": 10.0, "control": 8.0, "scratch": 12.0, "converted": 40.0, "continued": 8.5,
        "spiked": 8.55,
    }  # fmt: skip
    return {"perplexity": good | changed}


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({}, []),
        ({"converted": 50.1}, ["converted <= 5 x base"]),
        ({"control": 7.7}, ["continued <= 1.10 x control"]),
        ({"scratch": 9.9}, ["continued <= 0.85 x scratch"]),
        ({"spiked": 8.6}, ["spiked <= 1.01 x continued"]),
        ({"spiked": float("nan")}, ["spiked <= 1.01 x continued"]),
    ],
)
def test_the_verdict_names_what_is_missed(changed: dict[str, float], missed: list[str]) -> None:
    lines = verdict(perplexities(**changed))
    assert [line.split(":")[0] for line in lines if line.endswith("MISSED")] == missed
    assert sum(line.endswith(" met") for line in lines) == 4 - len(missed)


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({}, []),
        ({"moe_continued": 8.9, "moe_spiked": 8.9}, ["moe_continued <= 1.10 x control"]),
        ({"moe_spiked": 8.9}, ["moe_spiked <= 1.01 x moe_continued"]),
    ],
)
def test_the_verdict_judges_the_second_model(changed: dict[str, float], missed: list[str]) -> None:
    moe = {"moe_converted": 30.0, "moe_continued": 8.7, "moe_spiked": 8.75}
    lines = verdict(perplexities(**(moe | changed)))
    assert [line.split(":")[0] for line in lines if line.endswith("MISSED")] == missed
    assert sum(line.endswith(" met") for line in lines) == 6 - len(missed)
    assert "moe_converted 30.00" in lines[0]


def test_the_summary_takes_each_variant_from_its_own_evaluation(tmp_path: Path) -> None:
    (tmp_path / "evaluations").mkdir()
    for index, name in enumerate(VARIANTS):
        result = {
            "perplexity": 10.0 + index, "perplexity_beyond_window": 20.0 + index,
            "sparsity": {"mean_count": float(index)},
        }  # fmt: skip
        (tmp_path / "evaluations" / f"{name}.json").write_text(json.dumps(result))
    for index, name in enumerate(("base", "control", "continue", "scratch")):
        (tmp_path / name).mkdir()
        rows = [{"tokens": 7, "tokens_per_second": 1.0}, {"tokens": 9, "tokens_per_second": 5.0}]
        rows.append({"tokens": 100 + index, "tokens_per_second": 3.0})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name / "metrics.jsonl").write_text(text)
    summary = write_summary(tmp_path, {"prepare": 1.0, "base": 2.25})
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert list(summary["perplexity"].items())[2] == ("scratch", 12.0)
    assert summary["perplexity_beyond_window"]["spiked"] == 25.0
    assert summary["sparsity"] == {"mean_count": 5.0}
    assert summary["tokens_per_second"] == 3.0
    assert summary["tokens"] == {"base": 100, "control": 101, "continue": 102, "scratch": 103}
    assert summary["seconds"] == {"prepare": 1.0, "base": 2.25, "total": 3.2}


def test_a_failing_part_shows_the_end_of_its_log(tmp_path: Path) -> None:
    part = Part("broken", "inspect", (f"checkpoint={tmp_path / 'nothing'}",), 1.0)
    log = tmp_path / "broken.log"
    with pytest.raises(RuntimeError, match="broken ended with status 1") as caught:
        _run(part, 0, log, _Progress([1.0]))
    assert str(tmp_path / "nothing") in str(caught.value)
    assert log.read_text().startswith("$ python -m launch.inspect")


def test_a_part_that_was_stopped_is_not_done(tmp_path: Path) -> None:
    """Its status is 0, and the next part would take half a model for a whole one."""
    part = Part("base", "inspect", ("--help",), 1.0, tmp_path / "base")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "stopped.json").write_text("{}")
    with pytest.raises(RuntimeError, match=r"base was stopped before its end\. The same command"):
        _run(part, 0, tmp_path / "base.log", _Progress([1.0]))


def test_the_progress_line_counts_parts_by_their_share_of_the_time() -> None:
    progress = _Progress([100.0, 300.0])
    assert "about 6m40s left" in progress.line(0, "prepare", 0.0)
    line = progress.line(1, "train", 0.5)
    assert line.startswith("[2/2] train")
    assert " 50 % " in line


def test_a_skipped_part_costs_no_time_in_the_progress_line() -> None:
    progress = _Progress([100.0, 300.0])
    progress.skip(0)
    assert "about 5m00s left" in progress.line(1, "train", 0.0)


def two_parts(out: Path, *, first: str = "a=1") -> list[Part]:
    return [
        Part("data", "prepare", (first,), 1.0, out / "data"),
        Part("base", "train", ("b=1",), 1.0, out / "base"),
    ]


def make(out: Path, parts: list[Part], *, code: str = "code", upto: int = 2) -> list[str]:
    """Run the parts that must, each leaving its name behind; returns their names."""
    record = Record.open(out, code, parts)
    ran = []
    for part in parts[:upto]:
        assert part.output is not None
        if record.begin(part):
            part.output.mkdir(exist_ok=True)
            (part.output / "trace").open("a").write("x")
            record.complete(part, 2.0)
            ran.append(part.name)
        assert record.seconds(part) == 2.0
    return ran


def test_complete_parts_are_reused_and_an_interrupted_one_is_resumed(tmp_path: Path) -> None:
    assert make(tmp_path, two_parts(tmp_path)) == ["data", "base"]
    assert make(tmp_path, two_parts(tmp_path)) == []
    record = Record.open(tmp_path / "new", "code", two_parts(tmp_path / "new"))
    (tmp_path / "new" / "data").mkdir(parents=True)
    record.begin(two_parts(tmp_path / "new")[0])
    (tmp_path / "new" / "data" / "half").touch()
    assert make(tmp_path / "new", two_parts(tmp_path / "new")) == ["data", "base"]
    assert (tmp_path / "new" / "data" / "half").exists()


@pytest.mark.parametrize(
    ("change", "ran"),
    [({"first": "a=2"}, ["data", "base"]), ({"code": "other"}, ["data", "base"])],
)
def test_what_was_made_from_something_else_is_made_anew(
    tmp_path: Path, change: dict[str, str], ran: list[str]
) -> None:
    make(tmp_path, two_parts(tmp_path))
    code = change.pop("code", "code")
    assert make(tmp_path, two_parts(tmp_path, **change), code=code) == ran
    assert (tmp_path / "base" / "trace").read_text() == "x"


def test_a_removed_output_is_made_again(tmp_path: Path) -> None:
    make(tmp_path, two_parts(tmp_path))
    (tmp_path / "base" / "trace").unlink()
    (tmp_path / "base").rmdir()
    assert make(tmp_path, two_parts(tmp_path)) == ["base"]


def test_a_folder_that_nobody_recorded_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(ValueError, match=r"must be new or hold parts.json: got data"):
        make(tmp_path, two_parts(tmp_path))
    assert (tmp_path / "data").is_dir()


def test_the_code_stamp_sees_every_source_and_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("conf", "models"):
        (tmp_path / package).mkdir()
    monkeypatch.setattr("launch.quickstart_record.CONF", tmp_path / "conf")
    stamps = [code_stamp()]
    for name in ("conf/a.yaml", "models/b.py"):
        (tmp_path / name).write_text("1")
        stamps.append(code_stamp())
    (tmp_path / "models" / "notes.txt").write_text("1")
    assert code_stamp() == stamps[-1]
    assert len(set(stamps)) == 3
