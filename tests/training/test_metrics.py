"""Row files: never a step twice, whole after a kill; throughput by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from models.config import ModelConfig
from models.cost import flops_per_token
from models.mixer_config import SinkConfig
from training.metrics import RowFile, Throughput, Visible, read_rows, truncate_after


def line(step: int) -> str:
    return json.dumps({"step": step, "loss": 1.5}) + "\n"


@pytest.mark.parametrize(
    ("content", "last_step", "kept"),
    [
        (line(1) + line(2) + line(3), 2, [1, 2]),
        (line(1) + line(2) + line(3), 3, [1, 2, 3]),
        (line(1) + line(2) + line(3), 0, []),
        (line(1) + line(2)[:-5], 5, [1]),
        (line(1) + line(2).rstrip("\n"), 5, [1]),
        (line(1) + "{broken}\n" + line(2), 5, [1]),
        (line(1) + "[2]\n", 5, [1]),
        (line(1) + '{"loss": 1}\n', 5, [1]),
        ("", 5, []),
    ],
    ids=[
        "later rows", "nothing later", "all", "half a line", "no newline", "not json",
        "not an object", "no step", "empty",
    ],
)  # fmt: skip
def test_opening_drops_rows_after_the_checkpoint_and_half_lines(
    tmp_path: Path, content: str, last_step: int, kept: list[int]
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(content)
    rows = RowFile(path, last_step=last_step)
    assert [row["step"] for row in read_rows(path)] == kept
    rows.write({"step": last_step + 1})
    rows.close()
    assert [row["step"] for row in read_rows(path)] == [*kept, last_step + 1]


def test_truncation_reports_bytes_and_a_missing_file_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert truncate_after(path, 3) == 0
    assert read_rows(path) == []
    path.write_text(line(1) + line(2))
    assert truncate_after(path, 1) == len(line(2))


def test_every_row_is_in_the_file_as_soon_as_it_is_written(tmp_path: Path) -> None:
    rows = RowFile(tmp_path / "a" / "metrics.jsonl", last_step=0)
    rows.write({"step": 1})
    assert read_rows(rows.path) == [{"step": 1}]
    rows.sync()
    rows.close()


def test_numbers_that_json_cannot_hold_become_null(tmp_path: Path) -> None:
    rows = RowFile(tmp_path / "eval.jsonl", last_step=0)
    rows.write({"step": 1, "perplexity": float("inf"), "loss": float("nan"), "lr": 0.1})
    rows.close()
    assert read_rows(rows.path) == [{"step": 1, "perplexity": None, "loss": None, "lr": 0.1}]


def test_read_rows_leaves_out_a_line_that_is_being_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(1) + '{"step": 2')
    assert [row["step"] for row in read_rows(path)] == [1]


MODEL = ModelConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    mixers="F S L",
    ffns="d*3",
    window_tokens=8,
)


def test_mfu_is_the_formula_of_the_spec_by_hand() -> None:
    """One step of 100 tokens in 2 s; F queries saw 10 keys on average, S queries 6."""
    projections = 16 * 16 + 2 * 16 * 8 + 16 * 16
    gates = 16 * 16 + 16 * 8
    matrices = 3 * (projections + 3 * 16 * 24) + gates + 50 * 16
    attention = 4 * 10 * 16 + 4 * 6 * 16
    linear = 2 * 4 * 4 * (4 + 2) + 2 * 64 * 16
    needed = 3 * (2 * matrices + attention + linear)
    visible = Visible(full=1000.0, window=600.0)
    row = Throughput(MODEL, peak_flops=1e6).row(100, 2.0, visible, microbatch_tokens=50)
    assert row["tokens_per_second"] == 50.0
    assert row["mfu"] == pytest.approx(50 * needed / 1e6)
    assert row["mfu_6n"] == pytest.approx(50 * 6 * matrices / 1e6)


def test_mfu_is_null_where_the_peak_is_unknown() -> None:
    visible = Visible(full=1.0, window=1.0)
    row = Throughput(MODEL, peak_flops=None).row(100, 2.0, visible, microbatch_tokens=50)
    assert row["mfu"] is None
    assert row["mfu_6n"] is None


def test_mfu_counts_what_sinks_take_once_a_microbatch() -> None:
    model, visible = replace(MODEL, sinks=SinkConfig(num_tokens=4)), Visible(1000.0, 600.0)
    throughput = Throughput(model, peak_flops=1e6)
    for microbatch_tokens in (25, 50):
        row = throughput.row(100, 2.0, visible, microbatch_tokens=microbatch_tokens)
        needed = flops_per_token(model, 10.0, 6.0, microbatch_tokens=microbatch_tokens)
        assert row["mfu"] == pytest.approx(50 * needed / 1e6)
