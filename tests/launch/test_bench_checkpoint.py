"""`launch.bench suite=checkpoint`: what is saved, which rows there are, nothing left behind."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from launch.bench_checkpoint import HELD_GOAL, checkpoint, planned_bytes
from launch.bench_engine import EngineRun, run_config
from launch.bench_rows import Setting
from models.config import ModelConfig
from models.cost import parameter_count
from parallel.config import ParallelConfig
from tests.launch.tiny_bench import setting
from tests.models.tiny import tiny_config


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def state_bytes(model: ModelConfig) -> int:
    """Weights and two moments, float32."""
    return 3 * 4 * parameter_count(model)


def test_rows_of_saves_beside_training(folder: Path) -> None:
    size, held, *others = checkpoint(setting())
    assert size.name == "checkpoint: bytes of weights and moments vs plan"
    assert size.ours == state_bytes(tiny_config())
    assert size.met is True
    name = f"checkpoint of {size.ours / 1e9:.3g} GB"
    assert held.name == f"{name}: training held, asynchronous vs not"
    assert held.goal == HELD_GOAL
    assert [row.name.removeprefix(f"{name}: ") for row in others] == [
        "held by the first, which finds its memory",
        "written beside training vs not",
        "a step with a save beside it vs without",
    ]
    assert all(row.ours > 0 and row.baseline for row in (held, *others))
    assert not list(folder.iterdir())


def test_a_save_that_fails_is_one_error_and_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(run: EngineRun) -> None:
        raise ValueError("no step")

    rows = checkpoint(setting())
    next(rows)
    monkeypatch.setattr(EngineRun, "step", fail)
    with pytest.raises(ValueError, match="no step"):
        next(rows)
    assert not list(folder.iterdir())


def test_the_plan_knows_what_a_checkpoint_holds() -> None:
    def planned(here: Setting) -> int:
        return planned_bytes(run_config(here, ParallelConfig()), here)

    tied = tiny_config(tie_word_embeddings=True)
    for model in (tiny_config(), tied):
        assert planned(setting(model)) == state_bytes(model)
