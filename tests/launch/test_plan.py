"""`launch.plan`: what it prints and writes, what it finds, and what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.compose import load_config
from launch.config_errors import ConfigError
from launch.plan import PlanConfig, _planned, _searched
from launch.plan_run import plan_run, wanted_devices
from launch.plan_search import Refusals, candidates, search
from launch.plan_text import describe
from launch.schema import CONF
from models.cost import parameter_count
from parallel.backend.devices import DeviceName, device_facts
from parallel.config import ParallelConfig

ROOT = Path(__file__).resolve().parents[2]
H100 = device_facts(DeviceName.h100)


def load(*overrides: str) -> PlanConfig:
    return load_config("plan", PlanConfig, list(overrides))


def planned_text(*overrides: str) -> str:
    config = load(*overrides)
    return "\n".join(_planned(config, device_facts(config.plan.device))[0])


def test_plan_composes_what_train_composes() -> None:
    train = yaml.safe_load((CONF / "config.yaml").read_text())
    plan = yaml.safe_load((CONF / "plan.yaml").read_text())
    assert plan["defaults"] == [
        "plan_schema" if entry == "train_schema" else entry for entry in train["defaults"]
    ]
    assert plan["run_dir"] == train["run_dir"]
    config = load("experiment=cpt_7b", "parallel.tp=2", "plan.device=c550")
    assert (config.experiment, config.parallel.tp) == ("cpt_7b", 2)
    assert config.plan.device is DeviceName.c550


def test_a_plan_says_everything_about_each_stage() -> None:
    text = planned_text(
        "experiment=cpt_7b", "parallel.pp=4", "parallel.tp=2", "parallel.sequence_parallel=true",
        "parallel.shard=gradients", "plan.num_devices=32", "training.recompute=selective",
    )  # fmt: skip
    assert "mixers [L S]*14 | ffns d*28 | 7,616,542,976 parameters | bf16" in text
    assert "32 x h100: 80 GiB, 3,350 GB/s" in text
    layout = (
        "pp 4 (one_f_one_b) x dp 4 (gradients) x tp 2 + sequence parallel, 1 row, "
        "recompute selective (norms, activations)"
    )
    for name, length in (("cpt_8k", 8192), ("cpt_32k", 32_768), ("cpt_128k", 131_072)):
        assert f"{name}: " in text
        assert f" x {length} tokens a step" in text
    assert text.count(layout) == 3
    for words in (
        "0-6 + embedding", " + head", "in flight", "optimizer", "peak of the fullest rank",
        "residual stream", "all-gather", "partial gradients", "activations", "send",
        "FLOPs a token: 44.34 G", "bubble", "predicted: ", "MFU ",
    ):  # fmt: skip
        assert words in text, words


def test_a_plan_of_experts_says_who_holds_them_and_what_they_send() -> None:
    text = planned_text("experiment=cpt_76b", "plan.device=c550")
    assert "76,055,745,024 parameters | bf16" in text
    assert "512 x c550" in text
    layout = (
        "pp 4 (one_f_one_b) x dp 128 (gradients) with ep 8, 1 row, "
        "recompute selective (norms, activations, experts)"
    )
    assert text.count(layout) == 3
    for words in (
        "rows of experts", "all-to-all", "edp_shard", "routing", "loaded them evenly",
    ):  # fmt: skip
        assert words in text, words
    # The 8k stage fits the report's devices; the others wait for sequences cut over ranks.
    assert [text.count(f"  {verdict}: ") for verdict in ("fits", "does NOT fit")] == [1, 2]


def test_the_search_cuts_experts_too() -> None:
    overrides = ("model=spikingbrain_nano_moe", "training.precision=bf16", "plan.num_devices=8")
    config = load("experiment=smoke_fp32", *overrides, "plan.search=true", "plan.top=1000")
    found = search(config, H100, 8, 1000)
    layouts = [run.first.layout for run in found.best]
    assert {layout.ep for layout in layouts} == {1, 2, 4}
    assert all(layout.dp % layout.ep == 0 for layout in layouts)
    assert any("with ep 4" in describe(run.first) for run in found.best)
    dense = load("experiment=smoke_fp32", "plan.num_devices=8", "plan.search=true")
    assert {run.first.layout.ep for run in search(dense, H100, 8, 1000).best} == {1}


def test_a_cut_of_experts_that_dp_does_not_have_is_refused_with_its_reason() -> None:
    config = load(
        "experiment=smoke_fp32", "model=spikingbrain_nano_moe", "model.moe.num_experts=6",
        "plan.num_devices=8", "plan.search=true",
    )  # fmt: skip
    reasons = [reason for reason, _ in search(config, H100, 8, 1).refused]
    assert any(re.match(r"parallel\.ep \(3\) must divide parallel\.dp", each) for each in reasons)


def test_kernels_are_those_of_the_precision() -> None:
    for precision, kernels in (
        ("bf16", "fla and flash_attn"),
        ("fp32", "fla and blocked"),
        ("fp64", "chunked and blocked"),
    ):
        text = planned_text("experiment=smoke", f"training.precision={precision}")
        assert f"kernels {kernels}" in text
    assert "kernels chunked and blocked" in planned_text("experiment=smoke", "plan.device=cpu")


def test_what_does_not_fit_is_said() -> None:
    assert "  fits: " in planned_text("plan.device=cpu")
    text = planned_text("model=spikingbrain_7b", "experiment=smoke", "plan.device=a100")
    assert "  does NOT fit: " in text


def test_the_json_holds_the_numbers(tmp_path: Path) -> None:
    config = load("experiment=smoke", "parallel.pp=2", "parallel.ep=2", "plan.device=cpu")
    _, record = _planned(config, device_facts(config.plan.device))
    again: dict[str, Any] = json.loads(json.dumps(record))
    (stage,) = again["stages"]
    assert (again["layout"]["pp"], again["layout"]["ep"]) == (2, 2)
    assert again["layout"]["description"].startswith(
        "pp 2 (one_f_one_b) x dp 2 (gradients) with ep 2, "
    )
    assert [each["end_layer"] for each in again["pipeline_stages"]][-1] == 4
    held = sum(each["parameters"] for each in stage["memory"])
    assert held == parameter_count(config.model)
    assert stage["peak_bytes"] == max(each["peak"] for each in stage["memory"])
    kinds = {each["kind"] for rank in stage["traffic"] for each in rank}
    assert kinds == {"send", "all-gather", "reduce-scatter"}
    assert stage["time"]["tokens_per_second"] > 0


def test_the_given_layout_says_how_many_devices() -> None:
    assert wanted_devices(ParallelConfig(pp=2, tp=4)) == 8
    assert wanted_devices(ParallelConfig(dp=6)) == 6
    assert wanted_devices(ParallelConfig(dp_replicate=2, dp_shard=3, pp=2)) == 12
    assert wanted_devices(ParallelConfig(pp=2, dp_replicate=6, ep=4)) == 24
    assert wanted_devices(ParallelConfig(dp=16, ep=8)) == 16


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.tp=3"], r"parallel\.tp \(3\) must divide model\.num_attention_heads: got 8"),
        (
            ["model=spikingbrain_nano_moe", "parallel.ep=3", "plan.num_devices=3"],
            r"parallel\.ep \(3\) must divide model\.moe\.num_experts: got 4",
        ),
        (["parallel.pp=8"], r"parallel\.pp \(8\) must give at most one stage a layer"),
        (
            ["plan.num_devices=5", "parallel.tp=2"],
            r"parallel\.pp x parallel\.tp \(1 x 2\) must divide the number of processes: got 5",
        ),
        (
            ["plan.num_devices=7"],
            r"stages\.main\.global_batch_tokens \(4096: 32 rows of 128\) must be a multiple of dp",
        ),
        (
            ["parallel.pp=4", "training.microbatch_rows=16"],
            r"The number of microbatches \(2\) must be at least the number of stages",
        ),
        (["optimizer.freeze=[nothing]"], r"optimizer\.freeze \('nothing'\) must match"),
    ],
)
def test_impossible_layouts_are_refused_as_a_run_would(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planned_text(*overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["plan.device=b200"], r"plan\.device \(b200\) must be one of h100, h200, a100, c550"),
        (["plan.num_devices=0"], r"plan\.num_devices \(0\) must be at least 1, or null"),
        (["plan.top=0"], r"plan\.top \(0\) must be at least 1"),
        (["plan.search=true"], r"plan\.search \(true\) must come with plan\.num_devices"),
        (["plan.devise=h100"], r"plan\.devise is not a known key\. Did you mean plan\.device"),
        (["parallel.shrd=none"], r"parallel\.shrd is not a known key"),
    ],
)
def test_wrong_options_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(*overrides)


def test_the_search_finds_the_fastest_that_fit_and_says_why_not() -> None:
    config = load(
        "experiment=smoke_fp32", "training.precision=bf16", "plan.num_devices=8",
        "plan.search=true", "plan.top=3",
    )  # fmt: skip
    found = search(config, H100, 8, 3)
    assert len(found.best) == 3
    seconds = [each.seconds for each in found.best if each.seconds is not None]
    assert seconds == sorted(seconds)
    assert len(seconds) == 3
    assert all(each.fits and each.first.layout.num_devices == 8 for each in found.best)
    reasons = dict(found.refused)
    assert any("must give at most one stage a layer" in reason for reason in reasons)
    assert any("must be none or selective for parallel.schedule zero_bubble" in r for r in reasons)
    assert any("must divide model.num_key_value_heads: got 4" in reason for reason in reasons)
    assert sum(reasons.values()) < found.num_tried
    lines, record = _searched(config, H100)
    text = "\n".join(lines)
    assert f"3 fastest of {found.num_tried} layouts" in text
    assert describe(found.best[0].first) in text
    assert f"{sum(reasons.values())} refused:" in text
    assert len(record["best"]) == 3
    assert record["best"][0]["seconds"] == seconds[0]


def test_no_layout_that_was_tried_beats_the_best() -> None:
    config = load("experiment=smoke_fp32", "training.precision=bf16")
    best = search(config, H100, 4, 1).best[0]
    assert best.seconds is not None
    for overrides in (["parallel.tp=4"], ["parallel.tp=2"], ["parallel.pp=2"], []):
        other = load("experiment=smoke_fp32", "training.precision=bf16", *overrides)
        seconds = plan_run(other, H100, 4).timed().seconds
        assert seconds is not None
        assert seconds >= best.seconds


def test_what_the_search_proposes_serves_every_stage() -> None:
    """Eight ranks would share out the rows of the 8k stage, but not those of the 128k one."""
    config = load("experiment=curriculum_tiny", "training.microbatch_rows=1")
    rows = [stage.rows_per_step for stage in config.stages.values()]
    found = search(config, H100, rows[0], 1000)
    assert rows[0] > rows[-1]
    dps = {run.first.layout.dp for run in found.best}
    assert dps
    assert max(dps) <= rows[-1]
    assert all(len(run.stages) == len(rows) for run in found.best)


def test_the_search_says_what_of_the_run_it_replaces() -> None:
    config = load(
        "experiment=smoke", "plan.search=true", "plan.num_devices=1", "parallel.tp=3",
        "parallel.schedule=gpipe", "parallel.vocab_multiple=4", "training.recompute=selective",
        "training.recompute_modules=[linear]", "training.max_steps=3",
    )  # fmt: skip
    lines, record = _searched(config, H100)
    (line,) = (line for line in lines if "replaces" in line)
    assert record["replaced"][:2] == ["parallel.tp (3)", "parallel.schedule (gpipe)"]
    for key in ("recompute (selective)", "recompute_modules ([linear])", "microbatch_rows (4)"):
        assert f"training.{key}" in line
    assert "vocab_multiple" not in line
    assert "max_steps" not in line


def test_a_search_without_a_fitting_layout_still_says_what_was_planned() -> None:
    config = load(
        "experiment=smoke", "model=spikingbrain_7b", "plan.search=true", "plan.num_devices=1",
        "optimizer.freeze=[embedding.weight]",
    )  # fmt: skip
    lines, record = _searched(config, H100)
    text = "\n".join(lines)
    assert "7,616,542,976 parameters" in lines[0]
    assert "counted as if every parameter were trained" in text
    assert "0 fastest of" in text
    assert "needs more than the usable 72 GiB" in text
    assert record["best"] == []
    assert len(record["left_out"]) == 1


def test_every_stage_runs_on_the_cut_that_the_run_makes() -> None:
    """A run is cut once, by its first stage; by 128k rows full attention would be cut elsewhere."""
    overrides = ("experiment=cpt_7b", "model=qwen2_5_7b", "parallel.pp=4")
    run = plan_run(load(*overrides), H100, 8)
    alone = plan_run(load(*overrides, "~stages.cpt_8k", "~stages.cpt_32k"), H100, 8)
    layers = [[stage.first_layer for stage in each.given.stages] for each in run.stages]
    assert layers[0] == layers[1] == layers[2]
    assert [stage.first_layer for stage in alone.first.given.stages] != layers[0]
    held = [[rank.parameters for rank in each.memory] for each in run.stages]
    assert held[0] == held[1] == held[2]


def test_copies_of_shards_stay_within_a_node() -> None:
    layouts = [make for make, _, _ in candidates(H100, 32)]
    made = [make() for make in layouts if make.keywords["pp"] == 1 and make.keywords["tp"] == 2]
    assert {each.dp_replicate for each in made} == {1, 4}


def test_reasons_that_differ_in_numbers_are_one() -> None:
    refused = Refusals()
    for reason in ("tp 8 of 28", "tp 16 of 28", "too large"):
        refused.add(reason)
    assert refused.most_common() == [("tp 8 of 28", 2), ("too large", 1)]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.plan", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_command_writes_json_and_exits_with_a_status(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "plan.json"
    done = run("experiment=smoke", "plan.device=h100", f"out={out}")
    assert done.returncode == 0, done.stderr
    assert "1 x h100" in done.stdout
    record = json.loads(out.read_text())
    assert record["device"]["name"] == "h100"
    assert record["stages"][0]["fits"] is True
    refused = run("experiment=smoke", f"out={tmp_path}")
    assert refused.returncode == 1
    assert f"error: out ({tmp_path}) must be a file: got a folder." in refused.stderr
    refused = run("experiment=smoke", "parallel.tp=3")
    assert refused.returncode == 1
    assert "error: parallel.tp (3) must divide" in refused.stderr
