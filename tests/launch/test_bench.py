"""What `launch.bench` compares and how it counts; never how fast anything is."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
import torch

from launch import bench_suites
from launch.bench import SUITES, BenchConfig, Suite, say_what_is_not_set, write_rows
from launch.bench_models import build, full_attention, hugging_face
from launch.bench_rows import ExactRow, Row, paired
from launch.compose import load_config
from launch.config_errors import ConfigError
from models.cost import parameter_count
from models.linear_attention import GatedLinearAttention
from parallel.backend.cpu import CpuBackend
from tests.launch.tiny_bench import setting
from tests.models.tiny import tiny_config

EACH = [
    pytest.param(name, dtype, marks=pytest.mark.slow if is_second else ())
    for name in sorted(set(SUITES) - {"parallel"})
    for dtype, is_second in ((torch.bfloat16, False), (torch.float32, name != "step"))
]


@pytest.fixture
def short_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_suites, "DECODE_TOKENS", (32, 64))


@pytest.mark.usefixtures("short_decode")
@pytest.mark.parametrize(("name", "dtype"), EACH, ids=str)
def test_every_suite_measures_every_row(name: str, dtype: torch.dtype) -> None:
    rows = list(SUITES[name](setting(dtype=dtype)))
    assert rows
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        assert all(figure is None or math.isfinite(figure) for figure in (row.ours, row.ratio))


def test_every_suite_has_a_name_on_the_command_line() -> None:
    assert {suite.value for suite in Suite} == {*SUITES, "all"}


def test_the_hugging_face_baseline_has_the_sizes_of_our_full_attention_twin() -> None:
    here = setting()
    theirs = sum(p.numel() for p in hugging_face(here, "sdpa").parameters())
    assert theirs == parameter_count(full_attention(here.model))


def test_bfloat16_keeps_gates_and_norms_in_float32() -> None:
    model = build(setting(dtype=torch.bfloat16))
    mixers = [block.mixer for block in model.blocks if block.mixer is not None]
    linear = [m for m in mixers if isinstance(m.branches[0].core, GatedLinearAttention)]
    assert linear
    for mixer in linear:
        assert mixer.gate_up.weight.dtype is torch.float32
        assert mixer.head_norm.weight.dtype is torch.float32
        assert mixer.q_proj.weight.dtype is torch.bfloat16
    assert model.final_norm.weight.dtype is torch.float32


@pytest.mark.usefixtures("short_decode")
def test_decode_memory_is_flat_for_the_hybrid_and_grows_for_full_attention() -> None:
    hybrid = next(bench_suites.decode(setting(tiny_config(mixers="L S", ffns="d*2"))))
    assert hybrid.ratio == 1.0
    assert hybrid.met is True
    full = next(bench_suites.decode(setting(full_attention(tiny_config()))))
    assert full.ratio == 2.0
    assert full.met is False


def test_pairs_run_in_turn_after_one_warm_up() -> None:
    calls: list[str] = []
    paired(lambda: calls.append("a"), lambda: calls.append("b"), setting(), repeats=2)
    assert "".join(calls) == "ababab"


def test_a_row_without_a_figure_says_nothing_in_its_place(tmp_path: Path) -> None:
    rows = [
        Row("bare", 2.0, None, None, "GB/s"),
        Row("good", 1.0, 2.0, 0.5, "s", 0.5),
        Row("bad", 3.0, 2.0, 1.5, "s", 1.0),
    ]
    out = tmp_path / "deep" / "rows.json"
    write_rows(rows, out, setting())
    assert [row["met"] for row in json.loads(out.read_text())] == [None, True, False]
    table = out.with_suffix(".md").read_text().splitlines()
    assert table[2:] == [
        "| bare | 2 GB/s |  |  |  |  |",
        "| good | 1 s | 2 s | 0.500 | 0.5 | yes |",
        "| bad | 3 s | 2 s | 1.500 | 1 | no |",
    ]
    machine = json.loads(out.with_suffix(".machine.json").read_text())
    assert machine["vendor"] == "cpu"
    assert machine["model"]["hidden_size"] == tiny_config().hidden_size


def test_what_launch_scripts_would_export_is_named_and_kept_beside_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    proposed = {"SET_HERE": "1", "NOT_SET_HERE": "2"}
    monkeypatch.setattr(CpuBackend, "proposed_environment", lambda _: proposed)
    monkeypatch.setenv("SET_HERE", "0")
    with caplog.at_level(logging.INFO, logger="launch.bench"):
        say_what_is_not_set(CpuBackend())
    assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == [
        "NOT_SET_HERE=2"
    ]
    write_rows([], tmp_path / "rows.json", setting())
    machine = json.loads((tmp_path / "rows.machine.json").read_text())
    assert machine["environment"] == {"SET_HERE": "0", "NOT_SET_HERE": None}


def test_counts_are_met_when_they_are_equal_to_the_last_one() -> None:
    def met(ours: float, baseline: float, ratio: float | None) -> bool | None:
        return ExactRow("bytes", ours, baseline, ratio, "bytes", 1.0).met

    assert met(3, 3, 1.0) is True
    assert met(3, 4, 0.75) is False
    assert met(2**53 - 1, 2**53 - 2, 1.0) is False
    assert met(3, 0, None) is False
    assert "goal 1: met" in ExactRow("bytes", 3, 3, 1.0, "bytes", 1.0).line()


def test_tokens_of_a_step_fill_its_rows() -> None:
    for tokens, valid in ((4, 8), (1030, 1024), (0, 8)):
        message = rf"parallel_tokens \({tokens}\) must be a multiple .* got 8. Set it to {valid}\."
        with pytest.raises(ConfigError, match=message):
            load_config("bench", BenchConfig, [f"parallel_tokens={tokens}"])


def test_sizes_of_any_preset_and_growth_between_two_lengths() -> None:
    config = load_config("bench", BenchConfig, ["model=spikingbrain_7b"])
    assert parameter_count(config.model) == 7_616_542_976
    with pytest.raises(ConfigError, match=r"long_tokens \(64\) must be above short_tokens: got 64"):
        load_config("bench", BenchConfig, ["short_tokens=64", "long_tokens=64"])
