"""`launch.bench suite=moe`: which rows there are, and that no byte of them is unplanned."""

from __future__ import annotations

import pytest

from launch.bench_experts import LAYOUTS, moe
from tests.launch.tiny_bench import setting


@pytest.mark.slow
def test_bytes_of_experts_on_ranks_are_those_of_the_formula() -> None:
    rows = list(moe(setting()))
    layers = [row for row in rows if "vs dense of equal active FLOPs" in row.name]
    assert len(layers) == 3
    assert rows[:3] == layers
    sent = {
        "ep 2": ["all-gather", "reduce-scatter", "all-reduce", "all-to-all"],
        "dp 2 without ep": ["all-gather", "reduce-scatter", "all-reduce"],
    }
    expected = []
    for name in LAYOUTS:
        expected += [f"{name}: step of 64 tokens vs one process"]
        expected += [f"{name}: {kind} bytes vs formula" for kind in sent[name]]
    assert [row.name for row in rows[3:]] == expected
    for row in rows[3:]:
        assert row.met is (True if row.unit == "bytes" else None), row.line()
