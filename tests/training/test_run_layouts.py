"""The whole run under tensor and pipeline parallelism: rows, resuming and warm starts.

Everything is compared with the run of one process, in float64 with spiking on: `metrics.jsonl` and
`eval.jsonl` without what depends on the clock, the final checkpoint, the stream of samples.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.closeness import assert_close
from tests.support.distributed import run_ranks
from tests.training.tiny_run import manifest_of, rows_of, saved_tensors, tiny_run
from training.config import RunConfig
from training.run import run

LOSS = 1e-10
NORM = 1e-9
RESUMED_AT = 3
NUM_STEPS = 6
INTERLEAVED = {"pp": 2, "schedule": "interleaved"}
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one": {}},
    2: {
        "tp2": {"tp": 2},
        "tp2 sequence": {"tp": 2, "sequence_parallel": True},
        "pp2": {"pp": 2},
        "pp2 interleaved": INTERLEAVED,
        "pp2 zero bubble": {"pp": 2, "schedule": "zero_bubble", "virtual_stages": 2},
        "dp2": {"shard": "parameters"},
    },
    4: {"tp2 pp2": {"tp": 2, "pp": 2, "sequence_parallel": True}},
}
SIZES = {name: size for size, layouts in LAYOUTS.items() for name in layouts}
QUICK = ("one", "tp2 sequence", "pp2 interleaved")
PAIRS = [
    ("tp2", "dp2"),
    ("pp2", "tp2 sequence"),
    ("dp2", "one"),
    ("one", "pp2 interleaved"),
    ("tp2 pp2", "pp2 zero bubble"),
    ("pp2 interleaved", "tp2 pp2"),
]


def is_quick(*layouts: str) -> bool:
    return set(layouts) <= set(QUICK)


def marks(*layouts: str) -> tuple[pytest.MarkDecorator, ...]:
    return () if is_quick(*layouts) else (pytest.mark.slow,)


EACH = [pytest.param(name, marks=marks(name)) for name in SIZES if name != "one"]
EACH_PAIR = [pytest.param(*pair, marks=marks(*pair)) for pair in PAIRS]


def config_of(data: Path, run_dir: Path, layout: str, **changes: Any) -> RunConfig:
    """Six steps in two stages of other shapes; held-out rows that nothing divides."""
    return tiny_run(
        data,
        run_dir,
        model={"mixers": "L S F L", "ffns": "d*4", "tie_word_embeddings": True},
        training={"precision": "fp64", "microbatch_rows": 2},
        evaluation={"interval_steps": 2, "rows": 5},
        checkpoint={"interval_steps": RESUMED_AT},
        parallel=LAYOUTS[SIZES[layout]][layout],
        **changes,
    )


def run_all(rank: int, world_size: int, configs: list[RunConfig]) -> None:
    """One run after the other in the same processes."""
    for config in configs:
        assert run(config)


def run_by_size(folder: Path, configs: Mapping[str, list[RunConfig]]) -> None:
    """Run the configs of each layout on as many ranks as it needs."""
    for size, layouts in LAYOUTS.items():
        wanted = [config for layout in layouts for config in configs.get(layout, [])]
        if wanted:
            run_ranks(run_all, size, wanted, tmp_path=folder)


@dataclass(frozen=True)
class Runs:
    """Finished runs: `whole` at one layout each, `resumed` at two, `warm` from weights."""

    folder: Path

    def whole(self, layout: str) -> Path:
        return self.folder / layout

    def resumed(self, first: str, then: str) -> Path:
        return self.folder / f"{first} then {then}"

    def warm(self, layout: str) -> Path:
        return self.folder / f"{layout} warm"


def make(data: Path, runs: Runs, layouts: list[str], pairs: list[tuple[str, str]]) -> None:
    """Whole and warm runs at `layouts`, and those that change the layout as `pairs` do."""
    run_by_size(runs.folder, {name: [config_of(data, runs.whole(name), name)] for name in layouts})
    second: dict[str, list[RunConfig]] = {}
    for first, then in pairs:
        run_dir = runs.resumed(first, then)
        shutil.copytree(runs.whole(first), run_dir)
        shutil.rmtree(run_dir / "checkpoints" / f"step_{NUM_STEPS:08d}")
        second.setdefault(then, []).append(config_of(data, run_dir, then))
    weights = {"checkpoint": str(runs.whole("one"))}
    for name in layouts:
        warm = config_of(data, runs.warm(name), name, init=weights)
        second.setdefault(name, []).append(warm)
    run_by_size(runs.folder, second)


@pytest.fixture(scope="module")
def quick(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("layouts"))
    make(data, runs, list(QUICK), [pair for pair in PAIRS if is_quick(*pair)])
    return runs


@pytest.fixture(scope="module")
def every(data: Path, quick: Runs) -> Runs:
    slow = [name for name in SIZES if not is_quick(name)]
    make(data, quick, slow, [pair for pair in PAIRS if not is_quick(*pair)])
    return quick


@pytest.fixture
def runs(request: pytest.FixtureRequest) -> Runs:
    """The quick runs, and all others for a test that is marked slow."""
    is_slow = request.node.get_closest_marker("slow") is not None
    found: Runs = request.getfixturevalue("every" if is_slow else "quick")
    return found


def assert_same_rows(found: Path, expected: Path, *, counted_alike: bool) -> None:
    """All columns but the clock's. Spike statistics are equal, unless ranks sample other rows."""
    for name in ("metrics.jsonl", "eval.jsonl"):
        rows, wanted = rows_of(found, name), rows_of(expected, name)
        assert [list(row) for row in rows] == [list(row) for row in wanted]
        assert len(rows) == (NUM_STEPS if name == "metrics.jsonl" else NUM_STEPS // 2)
        for row, other in zip(rows, wanted, strict=True):
            for key, value in other.items():
                where = f"{name} step {row['step']} {key}"
                if key.startswith("spike/"):
                    assert not counted_alike or row[key] == value, where
                elif isinstance(value, float) and key != "lr":
                    relative = LOSS if key == "loss" else NORM
                    assert_close(row[key], value, relative=relative, name=where)
                else:
                    assert row[key] == value, where


def assert_same_end(found: Path, expected: Path) -> None:
    """The final checkpoints hold the same run."""
    for key in ("step", "tokens", "sample_hash", "num_updates", "stage", "stage_step"):
        assert manifest_of(found)[key] == manifest_of(expected)[key], key
    left, right = saved_tensors(found), saved_tensors(expected)
    assert left.keys() == right.keys()
    for name, tensor in right.items():
        assert_close(left[name], tensor, relative=NORM, name=name)


def test_the_oracle_has_something_to_compare(runs: Runs) -> None:
    rows = rows_of(runs.whole("one"))
    assert [any(key.startswith("spike/") for key in row) for row in rows] == [
        False, False, True, True, False, True,
    ]  # fmt: skip
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert len({row["sample_hash"] for row in rows}) == NUM_STEPS
    assert max(row["grad_norm"] for row in rows) > 1.0, "clipping must be active once"
    targets = {row["num_tokens"] for row in rows_of(runs.whole("one"), "eval.jsonl")}
    assert max(targets) > 4 * 16, "held-out rows beyond the last whole microbatch must count"


@pytest.mark.parametrize("layout", EACH)
def test_a_layout_trains_and_evaluates_as_one_process(runs: Runs, layout: str) -> None:
    found, expected = runs.whole(layout), runs.whole("one")
    assert_same_rows(found, expected, counted_alike=layout != "dp2")
    assert_same_end(found, expected)


@pytest.mark.parametrize(("first", "then"), EACH_PAIR)
def test_a_run_goes_on_under_another_layout(runs: Runs, first: str, then: str) -> None:
    found, expected = runs.resumed(first, then), runs.whole("one")
    assert_same_rows(found, expected, counted_alike="dp2" not in (first, then))
    assert_same_end(found, expected)


@pytest.mark.parametrize("layout", EACH)
def test_weights_of_another_layout_start_a_run(runs: Runs, layout: str) -> None:
    """`init.checkpoint`: every rank takes its part and knows what the others take."""
    found, expected = runs.warm(layout), runs.warm("one")
    assert rows_of(expected)[0]["loss"] != rows_of(runs.whole("one"))[0]["loss"]
    assert_same_rows(found, expected, counted_alike=layout != "dp2")
