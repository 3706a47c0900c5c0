"""`launch.bench suite=parallel`: rows of real ranks, what is left out and why, a fair baseline."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from launch import bench_layouts, bench_parallel
from launch.bench_engine import EngineRun, plain_step, run_config
from launch.bench_layouts import LAYOUTS
from launch.bench_parallel import parallel, possible, with_heads_for
from launch.bench_ranks import on_ranks
from launch.bench_rows import Row
from parallel.backend.cpu import CpuBackend
from parallel.backend.cuda import CudaBackend
from parallel.config import ParallelConfig
from parallel.mesh import close, init
from parallel.traffic import Kind, Traffic
from tests.launch.tiny_bench import setting
from tests.models.tiny import tiny_config

MEASURED = ("tp 2, sequence parallel", "pp 2, zero_bubble", "dp 2, parameters sharded")


def rows_of(rank: str) -> Iterator[Row]:
    """Two rows of every rank, but what `rank` 1 does is chosen."""
    yield Row(f"first of {os.environ['RANK']}", 1.0, None, None, "s")
    if os.environ["RANK"] == "1" and rank == "raises":
        raise ValueError("no such thing")
    if os.environ["RANK"] == "1" and rank == "dies":
        os._exit(7)
    if rank != "goes on":
        threading.Event().wait()  # as in a collective that another rank never enters
    yield Row("second", 2.0, None, None, "s")


def test_rows_are_those_of_rank_0_and_a_failure_is_one_error() -> None:
    assert [row.name for row in on_ranks(rows_of, "goes on", 3)] == ["first of 0", "second"]
    for what, reason in (
        ("raises", "ValueError: no such thing"), ("dies", "it died with exit status 7"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=rf"^rank 1 of 2 failed: {reason}$"):
            list(on_ranks(rows_of, what, 2))
        assert not multiprocessing.active_children()


def test_every_layout_has_its_time_and_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {2: {name: LAYOUTS[2][name] for name in MEASURED}}
    monkeypatch.setattr(bench_parallel, "LAYOUTS", chosen)
    engine, *rows = parallel(setting())
    assert engine.name == "engine vs plain loop, one process, 16 tokens"
    assert engine.goal == bench_parallel.ENGINE_GOAL
    sent = {
        "tp 2, sequence parallel": ["all-gather", "reduce-scatter", "all-reduce"],
        "pp 2, zero_bubble": ["send"],
        "dp 2, parameters sharded": ["all-gather", "reduce-scatter"],
    }
    expected = []
    for name in MEASURED:
        expected += [f"{name}: step of 64 tokens vs one process"]
        expected += [f"{name}: {kind} bytes vs formula" for kind in sent[name]]
    assert [row.name for row in rows] == expected
    for row in rows:
        assert row.ours > 0
        is_bytes = row.unit == "bytes"
        assert row.met is (True if is_bytes else None), row.line()


def test_a_formula_that_is_wrong_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = [Traffic("", Kind.send, "pp", 1, 8)]
    monkeypatch.setattr(bench_layouts, "step_traffic", lambda *_: wrong)
    here, config = setting(), run_config(setting(), ParallelConfig())
    mesh = init(CpuBackend(), ParallelConfig(), environment={})
    try:
        formula = bench_layouts.planned_traffic(config, here, mesh)
        run = EngineRun.start(config, here, mesh)
        turns = bench_layouts.Turns(run, None, mesh, num_threads=1)
        (row,) = bench_layouts.bytes_rows("alone", turns, formula)
    finally:
        close(mesh)
    assert (row.name, row.ours, row.baseline) == ("alone: send bytes vs formula", 0, 8)
    assert row.met is False


def test_a_plain_loop_computes_what_the_engine_computes() -> None:
    here = setting(dtype=torch.float64)
    config = run_config(here, ParallelConfig())
    mesh = init(CpuBackend(), ParallelConfig(), environment={})
    try:
        ours = EngineRun.start(config, here, mesh).step()
    finally:
        close(mesh)
    assert plain_step(config, here)() == pytest.approx(ours, rel=1e-12)


def test_what_a_model_or_a_machine_cannot_run_is_left_out_by_name(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    two_layers = setting(tiny_config(mixers="L S", ffns="d*2"))
    assert set(possible(two_layers, 4, LAYOUTS[4])) == set(LAYOUTS[4]) - {"tp 4", "pp 4"}
    assert "left out, tp 4: parallel.tp (4) must" in caplog.text
    assert "left out, pp 4: " in caplog.text
    caplog.clear()
    monkeypatch.setattr(CudaBackend, "num_devices", lambda _: 1)
    monkeypatch.setattr(CudaBackend, "kernels", CpuBackend.kernels)
    one_device = replace(two_layers, backend=CudaBackend())
    assert possible(one_device, 2, LAYOUTS[2]) == {}
    assert "left out, 1 devices are fewer than 2 ranks: tp 2; tp 2, sequence" in caplog.text


def test_a_model_gets_kv_heads_for_the_widest_tp_where_it_can(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    assert with_heads_for(tiny_config(), 4).num_key_value_heads == 4
    assert "4 KV heads instead of 2, for tp 4" in caplog.text
    enough = tiny_config(num_key_value_heads=4)
    odd = tiny_config(num_attention_heads=6, num_key_value_heads=2)
    for model in (enough, odd):
        assert with_heads_for(model, 4) is model
