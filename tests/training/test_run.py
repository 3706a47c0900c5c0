"""Whole runs in one process: what is written, exact resume, stages, warm starts, refusals."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from models.initialisation import tensor_for
from models.layouts import parameter_layouts
from parallel.backend.cpu import CpuBackend
from parallel.checkpoint import CheckpointError, step_directory
from parallel.mesh import RankError
from tests.support.distributed import run_ranks
from tests.training.tiny_run import (
    assert_same_run,
    manifest_of,
    prepare_data,
    rows_of,
    saved_tensors,
    tiny_run,
)
from training import run_folder
from training.config import RunConfig
from training.health import TrainingDivergedError
from training.metrics import read_rows
from training.resolved_config import plain, read_config
from training.run import joined, run


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole run, without interruption."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    run(tiny_run(data, run_dir, evaluation={"interval_steps": 3, "rows": 3}))
    return run_dir


def test_a_run_folder_holds_what_the_design_names(finished: Path, data: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names == {"config.yaml", "metrics.jsonl", "eval.jsonl", "checkpoints"}
    config = tiny_run(data, finished, evaluation={"interval_steps": 3, "rows": 3})
    assert read_config(finished / "config.yaml") == plain(config)
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == [
        "step_00000004", "step_00000006",
    ]  # fmt: skip


def test_metrics_have_a_row_a_step_with_all_fields(finished: Path) -> None:
    rows = read_rows(finished / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["tokens"] for row in rows] == [64, 128, 192, 320, 448, 576]
    assert [row["stage"] for row in rows] == ["short"] * 3 + ["long"] * 3
    for row in rows:
        for key in ("loss", "grad_norm", "lr", "tokens_per_second", "mfu", "mfu_6n"):
            assert row[key] > 0, key
        assert row["memory_bytes"] > 0
        assert len(row["sample_hash"]) == 16
    assert rows[0]["loss"] == pytest.approx(math.log(300), rel=0.05)
    assert len({row["sample_hash"] for row in rows}) == 6


def test_spike_statistics_appear_when_they_are_due(finished: Path) -> None:
    rows = read_rows(finished / "metrics.jsonl")
    with_spikes = [row["step"] for row in rows if any(key.startswith("spike/") for key in row)]
    assert with_spikes == [3, 4, 6]
    sites = {key.rsplit("/", 1)[0] for key in rows[3] if key.startswith("spike/")}
    assert sites == {
        f"spike/{layer}/{site}"
        for layer in (0, 1)
        for site in ("mixer_in", "mixer_out", "ffn_in", "ffn_out")
    }
    assert 0.0 < rows[3]["spike/0/ffn_in/firing_rate"] < 1.0


def test_evaluations_have_their_own_file(finished: Path) -> None:
    rows = read_rows(finished / "eval.jsonl")
    assert [(row["step"], row["stage"]) for row in rows] == [(3, "short"), (6, "long")]
    assert [row["spiking"] for row in rows] == [True, True]
    for row in rows:
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        assert 1 < row["perplexity"] < 400
        assert row["perplexity_beyond_window"] > 1
    assert rows[0]["position/0-15"] == pytest.approx(rows[0]["perplexity"])


def test_the_manifest_says_where_the_run_was(finished: Path, data: Path) -> None:
    manifest = manifest_of(finished)
    assert (manifest["step"], manifest["stage"], manifest["stage_step"]) == (6, "long", 3)
    assert manifest["tokens"] == 576
    assert manifest["sample_hash"] == read_rows(finished / "metrics.jsonl")[-1]["sample_hash"]
    assert manifest["model"]["mixers"] == "L S"
    assert manifest["versions"]["torch"] == torch.__version__
    tokenizer = step_directory(finished, 6) / "tokenizer" / "tokenizer.model"
    assert tokenizer.read_bytes() == (data / "tokenizer" / "tokenizer.model").read_bytes()


@pytest.mark.parametrize(
    ("precision", "first"), [("fp32", 2), ("fp32", 3), ("bf16", 5), ("fp64", 5)]
)
def test_stopping_early_and_going_on_is_bit_equal(
    data: Path, tmp_path: Path, precision: str, first: int
) -> None:
    training = {"precision": precision}
    run(tiny_run(data, tmp_path / "whole", training=training))
    run(tiny_run(data, tmp_path / "cut", training={**training, "max_steps": first}))
    assert len(rows_of(tmp_path / "cut")) == first
    before = manifest_of(tmp_path / "cut")
    assert before["step"] == first
    run(tiny_run(data, tmp_path / "cut", training=training))
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    assert manifest_of(tmp_path / "cut")["wandb_run_id"] == before["wandb_run_id"]


def test_rows_after_the_checkpoint_go_before_the_first_new_one(
    data: Path, tmp_path: Path, finished: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(step_directory(tmp_path / "run", 6))
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    run(tiny_run(data, tmp_path / "run", evaluation={"interval_steps": 3, "rows": 3}))
    assert_same_run(tmp_path / "run", finished)


def test_the_same_command_after_the_end_changes_nothing(
    data: Path, tmp_path: Path, finished: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    run(tiny_run(data, tmp_path / "run", evaluation={"interval_steps": 3, "rows": 3}))
    assert_same_run(tmp_path / "run", finished)


def test_more_steps_go_on_in_the_last_stage_at_its_final_rate(data: Path, tmp_path: Path) -> None:
    run(tiny_run(data, tmp_path / "run", training={"max_steps": 8}))
    rows = rows_of(tmp_path / "run")
    assert [row["stage"] for row in rows[5:]] == ["long"] * 3
    assert rows[5]["lr"] == rows[6]["lr"] == rows[7]["lr"] == pytest.approx(5e-4)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    data: Path, tmp_path: Path, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    victim = next(step_directory(tmp_path / "run", 6).glob("*.distcp"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        run(tiny_run(data, tmp_path / "run", evaluation={"interval_steps": 3, "rows": 3}))
    assert "step_00000006" in caplog.text
    assert victim.name in caplog.text
    assert_same_run(tmp_path / "run", finished)


def test_frozen_parameters_keep_their_first_values(data: Path, tmp_path: Path) -> None:
    config = tiny_run(
        data, tmp_path / "run", optimizer={"freeze": ["blocks.*.ffn.*", "embedding.weight"]}
    )
    run(config)
    saved = saved_tensors(tmp_path / "run")
    for name, layout in parameter_layouts(config.model).items():
        first = tensor_for(name, layout, config.model, config.seed)
        is_frozen = ".ffn." in name or name == "embedding.weight"
        assert torch.equal(saved[f"model/{name}"], first) is is_frozen, name
        assert (f"optimizer/exp_avg/{name}" in saved) is not is_frozen


def test_a_loss_that_is_not_finite_names_step_stage_and_samples(data: Path, tmp_path: Path) -> None:
    config = tiny_run(
        data, tmp_path / "run", optimizer={"clip_norm": None, "name": "sgd"},
        stages={"hot": {"sequence_length": 16, "steps": 9, "global_batch_tokens": 64, "lr": 1e12}},
        checkpoint={"interval_steps": 1}, spiking={"neuron": "off"},
    )  # fmt: skip
    with pytest.raises(TrainingDivergedError, match=r"must be finite.*step \d of stage hot, on"):
        run(config)
    failed = json.loads((tmp_path / "run" / "failed.json").read_text())
    rows = rows_of(tmp_path / "run")
    assert failed["step"] == rows[-1]["step"] + 1 == len(rows) + 1
    assert len(failed["sample_ids"]) == 4
    assert failed["sample_ids"][0] in failed["error"]
    assert manifest_of(tmp_path / "run")["step"] == rows[-1]["step"]
    assert all(torch.isfinite(tensor).all() for tensor in saved_tensors(tmp_path / "run").values())


def test_a_warm_start_takes_weights_only(
    data: Path, tmp_path: Path, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_run(data, tmp_path / "run", init={"checkpoint": str(finished)})
    frozen = {"freeze": ["blocks.*"]}
    with caplog.at_level(logging.INFO):
        run(tiny_run(data, tmp_path / "run", init={"checkpoint": str(finished)}, optimizer=frozen,
                     training={"max_steps": 1}))  # fmt: skip
    assert f"{len(parameter_layouts(config.model))} loaded, 0 new, 0 unused" in caplog.text
    before, after = saved_tensors(finished), saved_tensors(tmp_path / "run")
    for name in parameter_layouts(config.model):
        is_same = torch.equal(before[f"model/{name}"], after[f"model/{name}"])
        assert is_same is name.startswith("blocks."), name
    manifest = manifest_of(tmp_path / "run")
    assert (manifest["step"], manifest["num_updates"]) == (1, 1)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("rows", {"training": {"microbatch_rows": 3}},
     r"stages\.short\.global_batch_tokens \(64: 4 rows of 16\) must be a multiple of dp x "
     r"microbatch_rows rows: got dp 1 x 3\. Set it to 48 or 96, or training\.microbatch_rows to "
     r"one of \[1, 2, 4\]"),
    ("freeze", {"optimizer": {"freeze": ["nothing.*"]}}, r"optimizer\.freeze \('nothing\.\*'\)"),
    ("vocabulary", {"model": {"vocab_size": 299}},
     r"vocab_size of .* \(300\) must not be above model\.vocab_size: got 299"),
    ("corpus", {"data": {"path": None, "corpus": {"vocab_size": 301}}},
     r"data\.corpus\.vocab_size \(301\) must not be above model\.vocab_size: got 300"),
    ("data", {"data": {"path": "/nowhere"}}, r"data\.path \(/nowhere\) must be a prepared folder"),
    ("init", {"init": {"checkpoint": "/nowhere"}}, r"^init\.checkpoint \(/nowhere\) must be"),
    ("schedule", {"schedule": {"warmup_steps": 4}}, r"stages\.short\.schedule\.warmup_steps"),
    ("max_steps", {"training": {"max_steps": 0}}, r"training\.max_steps \(0\) must be at least 1"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), [case[1:] for case in REFUSED],
                         ids=[case[0] for case in REFUSED])  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_is_written(
    data: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tiny_run(data, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_another_tokenizer_is_refused_by_hash(tmp_path: Path, finished: Path) -> None:
    other = prepare_data(tmp_path / "other", seed=5, vocab_size=299)
    config = tiny_run(other, tmp_path / "run", init={"checkpoint": str(finished)})
    with pytest.raises(ValueError, match=r"tokenizer of the data \(sha256 [0-9a-f]{12}\) must be"):
        run(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 4}, r"seed \(4\) must stay what this run_dir began with: got 3"),
        ({"model": {"window_tokens": 4}}, r"model\.window_tokens \(4\) must stay"),
        ({"optimizer": {"name": "sgd"}}, r"optimizer\.name \(sgd\) must stay"),
        (
            {"stages": {
                "short": {"sequence_length": 16, "steps": 4, "global_batch_tokens": 64, "lr": 1e-2},
                "long": {"sequence_length": 32, "steps": 3, "global_batch_tokens": 128, "lr": 5e-3},
            }},
            r"stages \(step 6 is long at 2\) must put the checkpoint's step where it was: got long",
        ),
        (
            {"stages": {
                "short": {"sequence_length": 16, "steps": 3, "global_batch_tokens": 64, "lr": 1e-2},
                "long": {"sequence_length": 32, "steps": 9, "global_batch_tokens": 64, "lr": 5e-3},
            }},
            r"data of stage long \(fingerprint [0-9a-f]{12}\) must be the checkpoint's",
        ),
    ],
    ids=["seed", "model", "optimizer", "finished stage", "batch of the stage"],
)  # fmt: skip
def test_a_resumed_run_refuses_what_would_make_it_another_run(
    data: Path, tmp_path: Path, finished: Path, changes: dict[str, Any], message: str
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        run(tiny_run(data, tmp_path / "run", **changes))
    assert rows_of(tmp_path / "run") == rows_of(finished)


def test_other_changes_are_shown(
    data: Path, tmp_path: Path, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    with caplog.at_level(logging.WARNING):
        run(tiny_run(data, tmp_path / "run", checkpoint={"keep_last": 1}))
    assert "resuming with checkpoint.keep_last changed from 2 to 1" in caplog.text


def test_another_sample_order_is_found_by_the_hash(
    data: Path, tmp_path: Path, finished: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    path = step_directory(tmp_path / "run", 6) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["sample_hash_before"] = "f" * 16
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"sample_hash of step 6 \([0-9a-f]{16}\) must be the"):
        run(tiny_run(data, tmp_path / "run"))


def test_only_damaged_checkpoints_are_an_error(data: Path, tmp_path: Path, finished: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    for victim in (tmp_path / "run" / "checkpoints").glob("*/*.distcp"):
        victim.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"must hold an undamaged checkpoint: all 2"):
        run(tiny_run(data, tmp_path / "run"))


def hold_and_try(rank: int, world_size: int, config: RunConfig) -> str:
    """Hold the folder on all ranks, then let a second job of this process ask for it."""
    run_dir = Path(config.run_dir)
    run_folder.LOCK_WAIT_SECONDS = 0.0
    with joined(CpuBackend(), config) as mesh, run_folder.held(run_dir, mesh):
        try:
            with run_folder.held(run_dir, mesh):
                return "held twice"
        except (ValueError, RankError) as error:
            return str(error)


@pytest.mark.parametrize("size", [1, 2])
def test_two_jobs_never_share_a_run_folder(data: Path, tmp_path: Path, size: int) -> None:
    config = tiny_run(data, tmp_path / "run")
    messages = run_ranks(hold_and_try, size, config, tmp_path=tmp_path)
    for message in messages:
        assert re.search(r"run_dir \(.*run\) must belong to one job: process \d+ on", message)
    run(config)  # a lock ends with its process


def test_a_checkpoint_beyond_the_step_that_a_run_goes_on_from_is_kept_aside(
    finished: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    flip(step_directory(tmp_path / "run", 6) / "__0_0.distcp")
    changes = {"training": {"max_steps": 5}, "checkpoint": {"keep_last": 1}}
    run(tiny_run(data, tmp_path / "run", evaluation={"interval_steps": 3, "rows": 3}, **changes))
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {"step_00000005", "damaged_step_00000006"}
    assert "is beyond step 4" in caplog.text
    assert (tmp_path / "run" / "checkpoints" / "damaged_step_00000006" / "manifest.json").is_file()


def test_a_run_says_when_the_weights_it_began_with_were_replaced(
    finished: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "source"
    shutil.copytree(step_directory(finished, 6), source)

    def go(max_steps: int) -> None:
        caplog.clear()
        training = {"max_steps": max_steps}
        run(tiny_run(data, tmp_path / "run", init={"checkpoint": str(source)}, training=training))

    go(1)
    began_with = manifest_of(tmp_path / "run")["weights"]
    assert began_with["path"] == str(source)
    go(2)
    assert "has other weights than" not in caplog.text
    shutil.rmtree(source)
    shutil.copytree(step_directory(finished, 4), source)
    go(3)
    assert "has other weights than those that this run_dir began with" in caplog.text
    shutil.rmtree(source)
    go(4)
    assert "has other weights than" not in caplog.text
    assert manifest_of(tmp_path / "run")["weights"] == began_with


def test_a_damaged_checkpoint_is_no_start(finished: Path, data: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(step_directory(finished, 6), source)
    flip(source / "__0_0.distcp")
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp has other contents"):
        run(tiny_run(data, tmp_path / "run", init={"checkpoint": str(source)}))


def test_prepared_data_that_changed_on_the_disk_is_refused(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    config = tiny_run(tmp_path / "data", tmp_path / "run", training={"max_steps": 1})
    run(config)
    flip(tmp_path / "data" / "train.bin")
    with pytest.raises(ValueError, match=r"train\.bin .*must have the manifest's hash"):
        run(config)


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
