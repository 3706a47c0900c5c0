"""The command line: what composes, and one clear error for everything that does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.compose import compose_mapping, load_config
from launch.config_errors import ConfigError
from launch.generate import GenerateConfig
from launch.overrides import drop_launcher_arguments, quote_values
from launch.schema import flat_keys, help_text, schema_tree
from launch.train import main as train_main
from models.config import NeuronKind
from parallel.config import Precision
from training.config import RunConfig

ROOT = Path(__file__).resolve().parents[2]


def load(*overrides: str) -> RunConfig:
    return load_config("train", RunConfig, list(overrides))


def test_the_default_is_smoke() -> None:
    config = load()
    assert config.experiment == "smoke"
    assert config.run_dir == "outputs/smoke"
    assert config.training.precision is Precision.fp64
    assert config.spiking.neuron is NeuronKind.adaptive


def test_overrides_reach_typed_values_and_keys_absent_from_yaml() -> None:
    config = load("spiking=off", "optimizer.beta2=0.99", "model.linear.norm_eps=1e-5")
    assert config.spiking.neuron is NeuronKind.off
    assert config.optimizer.beta2 == 0.99
    assert config.model.linear.norm_eps == 1e-5


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("parallel.shrad=none", ["parallel.shrad", "parallel.shard"]),
        ("nonsense=1", ["nonsense", "--help"]),
        ("optimizer.lr=1", ["optimizer.lr is not a known key. Did you mean stages.*.lr"]),
        ("experiment=smokee", ["experiment (smokee)", "smoke_fp32", "Did you mean"]),
        ("spiking=of", ["spiking (of)", "adaptive, off"]),
        ("training.precision=fp8", ["training.precision (fp8)", "fp64, fp32 or bf16"]),
        ("training.microbatch_rows=two", ["training.microbatch_rows", "'two'", "integer"]),
        ("training.microbatch_rows=0", ["training.microbatch_rows (0)", "at least 1"]),
        ("stages.main.steps=2.5", ["stages.main.steps", "2.5", "integer"]),
        ("stages.main.global_batch_tokens=1000", ["1000", "sequence_length", "896", "1024"]),
        ("parallel.tp=0", ["parallel.tp (0)", "at least 1"]),
        ("parallel.pp=two", ["parallel.pp", "'two'", "integer"]),
        ("parallel.cp=2", ["parallel.cp (2)", "not in this release"]),
        ("parallel.ep=0", ["parallel.ep (0)", "at least 1"]),
        ("parallel.dp=0", ["parallel.dp (0)", "at least 1"]),
        ("parallel.sequence_parallel=true", ["parallel.sequence_parallel", "parallel.tp above 1"]),
        ("engine=deepspeed", ["engine (deepspeed)", "not in this release"]),
        ("engine.zero=1", ["engine.zero (1)", "parallel.shard"]),
        ("training.recompute=some", ["training.recompute (some)", "selective", "every_n"]),
        ("training.recompute_modules=[norm]", ["training.recompute_modules", "norm", "linear"]),
        ("model.mixers=LX", ["mixers", "'X'"]),
        ("model.num_key_value_heads=3", ["num_attention_heads (8)", "3"]),
        ("model.ffns=d*3", ["ffns (d*3", "3 layers", "4"]),
        ("model.window_tokens=null", ["window_tokens (None)", "S layers"]),
        ("model.moe.capacity_factor=inf", ["model.moe.capacity_factor (inf)", "finite number"]),
        ("model.moe.z_loss_coefficient=inf", ["model.moe.z_loss_coefficient (inf)", "finite"]),
        ("model.linear.gate_offset=nan", ["model.linear.gate_offset (nan)", "finite number"]),
        ("spiking.k=0", ["k (0", "above 0"]),
        ("spiking.statistics_tokens=0", ["statistics_tokens (0)", "at least 1"]),
        ("parallel.schedule=1f1b", ["parallel.schedule (1f1b)", "one_f_one_b", "zero_bubble"]),
        ("parallel.stage_layers=[1,x]", ["parallel.stage_layers.1", "'x'", "integer"]),
        ("training.teacher=DIR", ["training.teacher (DIR)", "distill.kl or distill.hidden"]),
        ("distill.kl=0.5", ["training.teacher (null)", "got 0.5 and 0"]),
        ("optimizer.clip_norm=-1", ["optimizer.clip_norm (-1", "above 0", "null"]),
        ("optimizer.clip_norm=nan", ["optimizer.clip_norm (nan)", "above 0"]),
        ("optimizer.beta2=1", ["optimizer.beta2 (1", "below 1"]),
        ("optimizer.eps=0", ["optimizer.eps (0", "above 0"]),
        ("optimizer.weight_decay=-0.1", ["optimizer.weight_decay (-0.1)", "at least 0"]),
        ("optimizer.new_parameter_lr_factor=-2", ["new_parameter_lr_factor (-2", "at least 0"]),
        ("stages.main.lr=-1e-3", ["lr (-0.001)", "at least 0"]),
        ("data.prefetch_steps=-1", ["data.prefetch_steps (-1)", "at least 0"]),
        ("checkpoint.keep_last=0", ["checkpoint.keep_last (0)", "at least 1"]),
        ("evaluation.rows=0", ["evaluation.rows (0)", "at least 1"]),
        ("logging.interval_steps=0", ["logging.interval_steps (0)", "at least 1"]),
        ("training.max_steps=0", ["training.max_steps (0)", "at least 1"]),
        ("training.recompute_every=2", ["training.recompute_every (2)", "every_n"]),
        ("'a b'", []),
    ],
)
def test_a_wrong_command_line_is_one_clear_error(override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(override)
    for part in parts:
        assert part in str(caught.value)


def test_all_wrong_values_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load("training.precision=fp8", "spiking.k=0")
    assert len(str(caught.value).splitlines()) == 2


def test_a_missing_required_key_is_named() -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size must be set"):
        load("model=from_checkpoint", "init.checkpoint=null", "model.hidden_size=8")


def test_the_schema_tree_lists_every_key_once() -> None:
    tree = schema_tree(RunConfig)
    assert tree["model"]["vocab_size"] == "???"
    assert tree["training"]["precision"] == "fp32"
    keys = list(flat_keys(RunConfig))
    assert len(keys) == len(set(keys))
    assert "stages.*.lr" in keys


def test_launcher_arguments_are_dropped() -> None:
    given = ["--local_rank=0", "--local-rank", "1", "seed=2"]
    assert drop_launcher_arguments(given) == ["seed=2"]


def test_help_names_groups_and_defaults_and_hides_what_is_not_there_yet() -> None:
    text = help_text("train", RunConfig, "Train.")
    assert "spiking: adaptive, off" in text
    assert "microbatch_rows: 1" in text
    for key in (
        "tp",
        "pp",
        "sequence_parallel",
        "virtual_stages",
        "dp_replicate",
        "stage_layers",
        "ep",
    ):
        assert f"    {key}: " in text
    for later in ("cp", "zero"):
        assert f"    {later}: " not in text


def test_model_group_choices_keep_their_parents_values() -> None:
    raw = compose_mapping("train", RunConfig, ["model=spikingbrain_7b"])
    assert raw["model"]["hidden_size"] == 3584
    assert raw["model"]["mixers"] == "[L S]*14"


@pytest.mark.parametrize(
    ("typed_in", "mixers"),
    [
        ("model.mixers=[L S]*2", "[L S]*2"),
        ("model.mixers='[L S]*2'", "[L S]*2"),
        ("model.mixers=L S L S", "L S L S"),
        ("model.mixers=F*4", "F*4"),
    ],
)
def test_patterns_need_no_quotes_of_their_own(typed_in: str, mixers: str) -> None:
    assert load(typed_in).model.mixers == mixers


def test_a_comma_separates_the_patterns_of_a_sweep() -> None:
    assert quote_values(["model.mixers=[L S]*2,F*4", "mixers=null", "lr=1,2"]) == [
        "model.mixers='[L S]*2','F*4'",
        "mixers=null",
        "lr=1,2",
    ]


@pytest.mark.parametrize(
    "text",
    ["Hello, world", "def read(path):", "it's", "it\\'s", "ends with \\", "[x] = {'a': 1}, ${b}",
     "two\nlines", "  spaces  ", "a=b"],
)  # fmt: skip
def test_a_prompt_arrives_as_it_was_typed(text: str) -> None:
    config = load_config("generate", GenerateConfig, ["checkpoint=x", f"prompt={text}"])
    assert config.prompt == text


def test_a_quoted_prompt_loses_its_quotes_only() -> None:
    config = load_config("generate", GenerateConfig, ["checkpoint=x", "prompt='def f(x):'"])
    assert config.prompt == "def f(x):"


def launch(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.train", *arguments], env={**os.environ, **environment},
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_exit_status_and_streams_of_a_real_process(tmp_path: Path) -> None:
    wrong = launch("parallel.shrad=none", f"run_dir={tmp_path / 'never'}")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: parallel.shrad is not a known key")
    assert "Traceback" not in wrong.stderr
    assert not (tmp_path / "never").exists()
    shown = launch("--cfg", "job", "experiment=smoke_fp32")
    assert shown.returncode == 0
    assert "precision: fp32" in shown.stdout
    helped = launch("--help")
    assert helped.returncode == 0
    assert "python -m launch.train key=value" in helped.stdout


def test_a_rank_above_0_says_why_it_leaves(tmp_path: Path) -> None:
    """The first rank that leaves makes torchrun end the others, who may not have said anything."""
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    wrong = launch("parallel.tpp=2", f"run_dir={tmp_path / 'never'}", **place)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error on rank 1: parallel.tpp is not a known key")
    assert "Traceback" not in wrong.stderr


@pytest.mark.slow
def test_each_job_of_a_sweep_has_a_run_folder_of_its_own(tmp_path: Path) -> None:
    swept = launch("--multirun", "training.precision=fp8,fp32", f"run_dir={tmp_path / 'never'}")
    assert swept.returncode == 2
    assert "error: training.precision (fp8) must be one of" in swept.stderr
    assert "Traceback" not in swept.stderr
    sweep = launch(
        "--multirun", "seed=1,2", f"run_dir={tmp_path / 'sweep'}", "experiment=smoke_fp32",
        f"data.corpus.out={tmp_path / 'data'}", "data.corpus.max_bytes=200000", "logging=disabled",
        "training.max_steps=2", "stages.main.global_batch_tokens=512",
    )  # fmt: skip
    assert sweep.returncode == 0, sweep.stderr
    for number in (0, 1):
        folder = tmp_path / "sweep" / f"job_{number}"
        assert f"seed: {number + 1}\n" in (folder / "config.yaml").read_text()
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_stopped_job_ends_its_sweep_with_status_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asked for the end did not mean one job of many."""
    begun: list[int] = []

    def stopped(config: RunConfig) -> bool:
        begun.append(config.seed)
        return False

    monkeypatch.setattr("training.run.run", stopped)
    arguments = ["--multirun", "seed=1,2", f"run_dir={tmp_path / 'sweep'}"]
    monkeypatch.setattr(sys, "argv", ["launch.train", *arguments])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as info:
        train_main()
    assert info.value.code == 0
    assert begun == [1]
