"""Whole runs of a model with experts: metrics, states in checkpoints, exact resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.training.tiny_run import assert_same_run, rows_of, saved_tensors, tiny_run
from training.config import RunConfig
from training.run import run


def config_of(data: Path, run_dir: Path, moe: dict[str, Any], **training: Any) -> RunConfig:
    model = {"ffns": "d e", "moe": {"num_experts": 4, "intermediate_size": 8, **moe}}
    return tiny_run(data, run_dir, model=model, training=training)


@pytest.mark.parametrize(
    ("moe", "precision", "first"),
    [
        ({"balance": "bias", "score": "sigmoid", "top_k": 2}, "fp32", 2),
        ({"balance": "previous_step", "capacity_factor": 1.25}, "bf16", 3),
    ],
    ids=["bias", "previous step"],
)
def test_stopping_early_and_going_on_is_bit_equal(
    data: Path, tmp_path: Path, moe: dict[str, Any], precision: str, first: int
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(config_of(data, whole, moe, precision=precision))
    run(config_of(data, cut, moe, precision=precision, max_steps=first))
    assert len(rows_of(cut)) == first
    run(config_of(data, cut, moe, precision=precision))
    assert_same_run(cut, whole)
    name = "selection_bias" if moe["balance"] == "bias" else "previous_load"
    state = saved_tensors(whole)[f"model/blocks.1.ffn.router.{name}"]
    before = 0.0 if name == "selection_bias" else 0.25
    assert float((state - before).abs().max()) > 1e-3


def test_rows_say_how_experts_are_used(data: Path, tmp_path: Path) -> None:
    moe = {"capacity_factor": 1.0, "z_loss_coefficient": 0.01}
    run(config_of(data, tmp_path / "run", moe))
    rows = rows_of(tmp_path / "run")
    shown = {
        "moe/1/load_max", "moe/1/load_min", "moe/1/dead_experts", "moe/1/dropped_share",
        "moe/1/entropy", "moe/1/max_logit", "moe/balance_loss", "moe/z_loss",
    }  # fmt: skip
    whole = {f"moe/1/load_{expert}" for expert in range(4)}
    for row in rows:
        found = {key for key in row if key.startswith("moe/")}
        assert found == (shown | whole if row["step"] in (1, 2, 4, 6) else shown)
        assert 0 <= row["moe/1/load_min"] <= 0.25 <= row["moe/1/load_max"] <= 1
        if "moe/1/load_0" in row:
            loads = [row[f"moe/1/load_{expert}"] for expert in range(4)]
            assert sum(loads) == pytest.approx(1.0)
            assert (min(loads), max(loads)) == (row["moe/1/load_min"], row["moe/1/load_max"])
