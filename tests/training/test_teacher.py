"""A run beside a frozen teacher: what it learns, what it records, what it refuses."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.checkpoint import step_directory
from tests.training.tiny_run import (
    assert_same_run,
    manifest_of,
    prepare_data,
    rows_of,
    saved_tensors,
    tiny_run,
)
from training.run import run


@pytest.fixture(scope="module")
def teacher(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain Transformer of another width and depth, trained for a moment."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    wide = {"mixers": "F*3", "ffns": "d*3", "hidden_size": 24}
    run(tiny_run(data, folder, model=wide, spiking={"neuron": "off"}))
    return folder


@pytest.fixture(scope="module")
def twin(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of the student's own shape."""
    folder = tmp_path_factory.mktemp("twin") / "run"
    run(tiny_run(data, folder, seed=11, spiking={"neuron": "off"}))
    return folder


def student(data: Path, folder: Path, teacher: Path, /, **changes: Any) -> Any:
    distill = {"kl": 1.0, **changes.pop("distill", {})}
    training = {"teacher": str(teacher), **changes.pop("training", {})}
    return tiny_run(data, folder, distill=distill, training=training, **changes)


def test_the_more_a_teacher_counts_the_nearer_the_student_stays(
    data: Path, tmp_path: Path, teacher: Path
) -> None:
    before = {name: tensor.clone() for name, tensor in saved_tensors(teacher).items()}
    divergences = {}
    stages = {"only": {"sequence_length": 32, "steps": 10, "global_batch_tokens": 128, "lr": 1e-2}}
    for kl in (1e-9, 50.0):
        folder = tmp_path / f"{kl:g}"
        off = {"neuron": "off"}
        run(student(data, folder, teacher, stages=stages, spiking=off, distill={"kl": kl}))
        rows = rows_of(folder)
        divergences[kl] = rows[-1]["distill/kl"]
        assert {row["distill/hidden"] for row in rows} == {0.0}
        assert not any("teacher" in name for name in saved_tensors(folder))
    assert 0 < divergences[50.0] < 0.2 * divergences[1e-9]
    after = saved_tensors(teacher)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_twin_teaches_each_layer_and_agrees_with_itself(
    data: Path, tmp_path: Path, twin: Path
) -> None:
    """A student that starts as its teacher has nothing to learn in the first step."""
    changes: dict[str, Any] = {"init": {"checkpoint": str(twin)}, "spiking": {"neuron": "off"}}
    run(student(data, tmp_path / "run", twin, distill={"hidden": 2.0}, **changes))
    rows = rows_of(tmp_path / "run")
    assert abs(rows[0]["distill/kl"]) < 1e-6
    assert rows[0]["distill/hidden"] == 0.0
    assert rows[-1]["distill/kl"] > 1e-5
    assert rows[-1]["distill/hidden"] > 1e-5


def test_the_loss_that_is_recorded_stays_the_cross_entropy(
    data: Path, tmp_path: Path, teacher: Path
) -> None:
    run(student(data, tmp_path / "taught", teacher, training={"max_steps": 1}))
    run(tiny_run(data, tmp_path / "alone", training={"max_steps": 1}))
    taught, alone = rows_of(tmp_path / "taught")[0], rows_of(tmp_path / "alone")[0]
    assert taught["loss"] == alone["loss"]
    assert taught["grad_norm"] != alone["grad_norm"]
    assert "distill/kl" not in alone


def test_a_taught_run_resumes_bit_for_bit(data: Path, tmp_path: Path, teacher: Path) -> None:
    run(student(data, tmp_path / "whole", teacher))
    run(student(data, tmp_path / "cut", teacher, training={"max_steps": 2}))
    run(student(data, tmp_path / "cut", teacher))
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


OTHER = "has other weights than those that this run has learned from"


def test_a_resumed_run_keeps_its_teacher_while_that_is_there(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The teacher's own run may go on meanwhile; its newer checkpoints are not taken."""
    school = tmp_path / "teacher"

    def teach(steps: int, keep_last: int) -> None:
        changes = {"training": {"max_steps": steps}, "checkpoint": {"keep_last": keep_last}}
        run(tiny_run(data, school, spiking={"neuron": "off"}, **changes))

    def learn(folder: str, steps: int) -> dict[str, Any]:
        caplog.clear()
        run(student(data, tmp_path / folder, school, training={"max_steps": steps}))
        noted: dict[str, Any] = manifest_of(tmp_path / folder)["teacher"]
        return noted

    teach(2, keep_last=1)
    learn("whole", 6)
    began_with = learn("cut", 2)
    assert began_with["path"] == str(step_directory(school, 2))
    teach(4, keep_last=2)
    assert learn("cut", 4) == began_with
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")[:4]
    assert OTHER not in caplog.text
    teach(6, keep_last=1)
    assert learn("cut", 5)["path"] == str(step_directory(school, 6))
    assert re.search(rf"training\.teacher \(.*step_00000006, fingerprint .*\) {OTHER}", caplog.text)
    assert rows_of(tmp_path / "cut")[-1] != rows_of(tmp_path / "whole")[4]
    assert learn("cut", 6)["path"] == str(step_directory(school, 6))
    assert OTHER not in caplog.text


def test_a_run_without_a_teacher_notes_none(data: Path, tmp_path: Path) -> None:
    run(tiny_run(data, tmp_path / "run", training={"max_steps": 1}))
    assert manifest_of(tmp_path / "run")["teacher"] is None


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "depth": (
        {"distill": {"hidden": 1.0}},
        r"training\.teacher \(hidden_size 24\) must have the student's hidden_size, because "
        r"distill\.hidden compares residual streams: got 16",
    ),
    "vocabulary": (
        {"model": {"vocab_size": 301}},
        r"training\.teacher \(vocab_size 300\) must have the student's vocab_size.*got 301",
    ),
    "no folder": (
        {"training": {"teacher": "/nowhere"}}, r"training\.teacher \(/nowhere\) must be a folder",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_teacher_that_does_not_fit_is_refused(
    data: Path, tmp_path: Path, teacher: Path, name: str
) -> None:
    changes, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        run(student(data, tmp_path / "run", teacher, **changes))
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_other_tokens_is_refused(tmp_path: Path, teacher: Path) -> None:
    other = prepare_data(tmp_path / "other", seed=5, vocab_size=299)
    with pytest.raises(ValueError, match=r"tokenizer of the data .* must be the checkpoint's"):
        run(student(other, tmp_path / "run", teacher))


def test_a_damaged_teacher_is_refused(data: Path, tmp_path: Path, teacher: Path) -> None:
    shutil.copytree(step_directory(teacher, 6), tmp_path / "damaged")
    victim = next((tmp_path / "damaged").glob("*.distcp"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    with pytest.raises(RuntimeError, match="damaged"):
        run(student(data, tmp_path / "run", tmp_path / "damaged"))


def test_offloading_on_a_cpu_warns(
    data: Path, tmp_path: Path, teacher: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        run(
            student(
                data, tmp_path / "run", teacher, distill={"offload": True},
                training={"max_steps": 1},
            )
        )  # fmt: skip
    assert "distill.offload (true) has no effect on a CPU" in caplog.text
