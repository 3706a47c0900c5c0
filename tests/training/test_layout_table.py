"""The table that a run prints before it starts: axes, stages, work and memory of each rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from models.cost import parameter_count
from parallel.backend.cpu import CpuBackend
from tests.support.fake_ranks import fake_mesh
from tests.training.tiny_run import tiny_run
from training.config import RunConfig
from training.engine_setup import describe
from training.layout_table import MEMORY_COLUMNS, aligned, layout_lines
from training.planned_job import planned_memory

KERNELS = ("chunked", "blocked")
FOUR_LAYERS = {"mixers": "L S F L", "ffns": "d*4"}


def config_with(**changes: Any) -> RunConfig:
    changes = {"model": FOUR_LAYERS, "training": {"microbatch_rows": 1}, **changes}
    return tiny_run(Path("data"), Path("run"), **changes)


def lines_of(config: RunConfig, world_size: int) -> list[str]:
    with fake_mesh(config.parallel, rank=0, world_size=world_size) as mesh:
        return list(layout_lines(config, mesh, kernels=KERNELS))


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().split("  ") if cell.strip()]


def test_the_table_of_a_pipeline() -> None:
    layout = {"pp": 2, "tp": 2, "sequence_parallel": True, "dp_replicate": 2,
              "schedule": "interleaved", "stage_layers": [1, 1, 2, 0]}  # fmt: skip
    stage = {"sequence_length": 16, "steps": 3, "global_batch_tokens": 256, "lr": 1e-2}
    config = config_with(parallel=layout, stages={"short": stage})
    lines = lines_of(config, 32)
    assert lines[0].endswith("parameters | fp32")
    assert lines[1:3] == [
        "32 ranks = pp 2 x dp 8 x tp 2 (sequence parallel), dp = 2 x 4 shards (gradients)",
        "schedule interleaved, 4 stages",
    ]
    assert lines[3].startswith("planned memory of a rank in MiB")
    header, first, second = (cells_of(line) for line in lines[4:])
    assert header[:3] == ["pp rank", "ranks", "layers"]
    assert header[-len(MEMORY_COLUMNS) :] == list(MEMORY_COLUMNS)
    assert first[:3] == ["0", "0-15", "0 2-3 + embedding"]
    assert second[:3] == ["1", "16-31", "1 none + head"]
    shares = [int(row[3].removesuffix("%")) for row in (first, second)]
    assert sum(shares) == pytest.approx(100, abs=1)


def test_memory_is_that_of_the_stage_that_takes_most() -> None:
    config = config_with()
    (both,) = planned_memory(config, num_ranks=1, kernels=KERNELS)
    assert both.parameters == parameter_count(config.model)
    alone = {
        name: planned_memory(config_with(stages={name: stage}), num_ranks=1, kernels=KERNELS)[0]
        for name, stage in (
            ("short", {"sequence_length": 16, "steps": 3, "global_batch_tokens": 64, "lr": 1e-2}),
            ("long", {"sequence_length": 32, "steps": 3, "global_batch_tokens": 128, "lr": 5e-3}),
        )
    }
    assert alone["short"].peak < alone["long"].peak
    assert both == alone["long"]


def test_the_table_of_one_process() -> None:
    config = config_with()
    lines = lines_of(config, 1)
    assert lines[1] == "1 rank = pp 1 x dp 1 x tp 1, dp = 1 x 1 shards (gradients)"
    header, row = (dict(enumerate(cells_of(line))) for line in lines[3:])
    shown = {name: row[index] for index, name in header.items()}
    (memory,) = planned_memory(config, num_ranks=1, kernels=KERNELS)
    assert (shown["ranks"], shown["layers"], shown["work"]) == (
        "0",
        "0-3 + embedding + head",
        "100%",
    )
    for column in MEMORY_COLUMNS:
        assert shown[column] == f"{getattr(memory, column) / 2**20:.2f}"


def test_a_teacher_is_said_to_be_left_out() -> None:
    assert "not counted" not in lines_of(config_with(), 1)[-1]
    config = config_with(training={"teacher": "runs/teacher"}, distill={"kl": 1.0})
    assert lines_of(config, 1)[-1].startswith("  not counted: training.teacher (runs/teacher), its")


def test_experts_are_said_to_be_shared_out() -> None:
    config = config_with(
        model={**FOUR_LAYERS, "ffns": "d e d e", "moe": {"num_experts": 8}}, parallel={"ep": 4}
    )
    lines = lines_of(config, 4)
    assert lines[2] == "experts over ep 4 of dp, 2 a rank"
    assert lines[3].startswith("planned memory of a rank in MiB")
    assert lines[-1].startswith("  experts are counted as if routers loaded them evenly: without")
    moe = {"num_experts": 8, "capacity_factor": 1.0}
    config = config_with(model={**FOUR_LAYERS, "ffns": "d e d e", "moe": moe})
    assert "evenly" not in lines_of(config, 1)[-1]


def test_sinks_are_counted() -> None:
    config = config_with(model={**FOUR_LAYERS, "sinks": {"num_tokens": 4}})
    assert not any("counted" in line for line in lines_of(config, 1))
    memory, without = (
        planned_memory(each, num_ranks=1, kernels=KERNELS)[0] for each in (config, config_with())
    )
    assert memory.parameters == parameter_count(config.model)
    assert memory.activations > without.activations


def test_columns_are_aligned() -> None:
    assert list(aligned([("a", "b"), ("long", "1,000"), ("c", "")])) == [
        "  a         b", "  long  1,000", "  c",
    ]  # fmt: skip


def test_only_the_first_rank_shows_it(caplog: pytest.LogCaptureFixture) -> None:
    config = config_with(parallel={"dp": 2})
    for rank, is_shown in ((0, True), (1, False)):
        caplog.clear()
        with fake_mesh(config.parallel, rank=rank, world_size=2) as mesh, caplog.at_level("INFO"):
            describe(config, CpuBackend(), mesh)
        assert any("pp rank" in message for message in caplog.messages) is is_shown
