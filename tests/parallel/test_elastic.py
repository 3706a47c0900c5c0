"""Any layout goes on from what any other saved: the same bits at load, the same numbers afterwards.

Every layout of the matrix saves once, after two steps, and loads what another one saved, drawn from
a seed; a slow run goes through all pairs. A few layouts are quick, and load from each other. The
oracle is the plain model without interruption.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.layouts import parameter_layouts
from parallel.backend.cpu import CpuBackend
from parallel.boxes import Box
from parallel.checkpoint import load, read_manifest, save, tensor_shapes
from parallel.config import Shard
from parallel.engine import TorchEngine
from parallel.mesh import Mesh, init
from tests.parallel.engine_cases import (
    LEARNING_RATE,
    Case,
    Run,
    build_engine,
    config_of,
    gather,
    train_step,
)
from tests.parallel.engine_oracle import GRADIENT, LOSS, oracle
from tests.parallel.test_layout_matrix import EIGHT, FOUR, TWO, case
from tests.support.closeness import assert_close
from tests.support.distributed import run_ranks

SAVED_AT, NUM_STEPS = 2, 4
DRAWN_FROM = 3

Digests = dict[str, str]


def is_only_a_layout(each: Case) -> bool:
    """Whether it trains the matrix's model, tied or not, as all the others do."""
    plain = replace(case(), parallel=each.parallel, microbatch_rows=each.microbatch_rows)
    return replace(each, tied=False) == plain


def of_the_matrix(cases: Mapping[str, Case]) -> dict[str, Case]:
    return {name: each for name, each in cases.items() if is_only_a_layout(each)}


def padded(each: Case) -> Case:
    """The last tp ranks hold nothing of the vocabulary but padding."""
    return replace(each, parallel=replace(each.parallel, vocab_multiple=128))


LAYOUTS: dict[int, dict[str, Case]] = {
    1: {"one": case(), "one tied": case(tied=True)},
    2: {
        **of_the_matrix(TWO),
        "tp2 sequence tied": case(tp=2, sequence_parallel=True, tied=True),
        "tp2 padded": padded(case(tp=2)),
    },
    4: {
        **of_the_matrix(FOUR),
        "tp2 dp2 padded tied": padded(case(tp=2, tied=True, shard=Shard.parameters)),
    },
    8: of_the_matrix(EIGHT),
}
SIZES = {name: world_size for world_size, cases in LAYOUTS.items() for name in cases}
CASES = {name: each for cases in LAYOUTS.values() for name, each in cases.items()}
QUICK = ("one", "tp2 padded", "pp2 interleaved", "dp2 parameters", "tp2 pp2")
NAMES = [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES]


def others(name: str) -> list[str]:
    """The layouts whose checkpoints a layout can load: those of the same model."""
    return [other for other in CASES if other != name and CASES[other].tied == CASES[name].tied]


@functools.cache
def drawn() -> dict[str, str]:
    """One other layout for each, from a seed; for a quick one, one that is as quick."""
    generator = random.Random(DRAWN_FROM)
    sources = {name: set(QUICK if name in QUICK else CASES) for name in CASES}
    return {
        name: generator.choice([other for other in others(name) if other in sources[name]])
        for name in CASES
    }


def names_of(world_size: int, is_quick: bool) -> list[str]:
    """What runs in the same processes."""
    return [name for name in LAYOUTS[world_size] if (name in QUICK) is is_quick]


@dataclass(frozen=True)
class Numbers:
    """Of consecutive steps."""

    losses: tuple[float, ...]
    norms: tuple[float, ...]


@dataclass(frozen=True)
class Saved:
    """What a layout's checkpoint holds, and the steps before it."""

    state: Digests
    numbers: Numbers


@dataclass(frozen=True)
class Resumed:
    """What a layout found in a checkpoint, and how it went on."""

    found: Digests
    numbers: Numbers
    parameters: dict[str, Tensor] = field(default_factory=dict)


def state_of(engine: TorchEngine) -> dict[str, Box]:
    return {
        **{f"model/{name}": box for name, box in engine.parameters.items()},
        **{f"optimizer/{name}": box for name, box in engine.optimizer_state().items()},
    }


def digests(tensors: Mapping[str, Tensor]) -> Digests:
    return {
        name: f"{tuple(tensor.shape)} {tensor.dtype} "
        + hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
        for name, tensor in tensors.items()
    }


def take_steps(engine: TorchEngine, each: Case, first: int, last: int) -> Numbers:
    """Losses and gradient norms."""
    steps = range(first, last)
    pairs = [(train_step(engine, each, n), engine.clip_and_step(LEARNING_RATE)) for n in steps]
    return Numbers(tuple(loss for loss, _ in pairs), tuple(norm for _, norm in pairs))


def save_each(rank: int, world_size: int, folder: Path, names: Sequence[str]) -> dict[str, Saved]:
    results = {}
    for name in names:
        each = CASES[name]
        mesh = init(CpuBackend(), each.parallel)
        engine = build_engine(mesh, each)
        numbers = take_steps(engine, each, 0, SAVED_AT)
        save(folder / name, state_of(engine), {"num_updates": engine.num_updates}, mesh=mesh)
        results[name] = Saved(digests(gather(mesh, state_of(engine))), numbers)
    return results


def resume(folder: Path, engine: TorchEngine, mesh: Mesh) -> Digests:
    """Load a checkpoint; returns what the ranks then hold together."""
    load(folder, state_of(engine), mesh=mesh)
    engine.num_updates = read_manifest(folder)["num_updates"]
    return digests(gather(mesh, state_of(engine)))


def load_drawn(
    rank: int, world_size: int, folder: Path, names: Sequence[str]
) -> dict[str, Resumed]:
    """Each layout loads the source drawn for it and trains to the end."""
    results = {}
    for name in names:
        each = CASES[name]
        mesh = init(CpuBackend(), each.parallel)
        engine = build_engine(mesh, each, seed=None)
        found = resume(folder / drawn()[name], engine, mesh)
        numbers = take_steps(engine, each, SAVED_AT, NUM_STEPS)
        parameters = gather(mesh, engine.parameters)
        results[name] = Resumed(found, numbers, {} if rank else parameters)
    return results


def load_all(rank: int, world_size: int, folder: Path) -> dict[tuple[str, str], Digests]:
    """Each layout of this many ranks loads all others, one after the other, over NaN."""
    results = {}
    for name, each in LAYOUTS[world_size].items():
        mesh = init(CpuBackend(), each.parallel)
        engine = build_engine(mesh, each, seed=None)
        for source in others(name):
            for box in state_of(engine).values():
                box.local.fill_(torch.nan)
            results[name, source] = resume(folder / source, engine, mesh)
    return results


class Runs:
    """What layouts saved and found, made when first asked for, the quick ones apart."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._saved: dict[str, Saved] = {}
        self._resumed: dict[str, Resumed] = {}

    def saved(self, name: str) -> Saved:
        """The checkpoint in `folder / name`."""
        if name not in self._saved:
            for size in LAYOUTS:
                self._saved |= self._run(save_each, size, name)
        return self._saved[name]

    def resumed(self, name: str) -> Resumed:
        """The layout after it loaded the source that is drawn for it."""
        if name not in self._resumed:
            for each in names_of(SIZES[name], name in QUICK):
                self.saved(drawn()[each])
            self._resumed |= self._run(load_drawn, SIZES[name], name)
        return self._resumed[name]

    def _run(self, body: Callable[..., Any], size: int, name: str) -> dict[str, Any]:
        names = names_of(size, name in QUICK)
        if not names:
            return {}
        results: dict[str, Any] = run_ranks(body, size, self.folder, names, tmp_path=self.folder)[0]
        return results


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("elastic"))


@functools.cache
def expected_run(tied: bool) -> Run:
    return oracle(case(tied=tied).oracle(), num_steps=NUM_STEPS)


def test_the_layouts_are_all_kinds() -> None:
    """Every axis and schedule saves and loads; each layout's source is another one."""
    assert {"tp4", "pp4", "dp4 parameters", "hsdp 2x2", "tp2 pp2 dp2"} < CASES.keys()
    assert {"pp2 interleaved tied", "pp2 zero bubble virtual", "tp2 sequence"} < CASES.keys()
    assert len(CASES) > 35
    assert set(QUICK) < CASES.keys()
    for name, source in drawn().items():
        assert CASES[name].parallel != CASES[source].parallel


@pytest.mark.parametrize("name", NAMES)
def test_files_hold_whole_parameters_and_no_padding(runs: Runs, name: str) -> None:
    """Whatever layout wrote them: true rows only, each moment beside its parameter."""
    config, saved = config_of(CASES[name]), runs.saved(name)
    table = {name: layout.global_shape for name, layout in parameter_layouts(config).items()}
    assert table["embedding.weight"] == (61, 24)
    kinds = ("model", "optimizer/exp_avg", "optimizer/exp_avg_sq")
    expected = {f"{kind}/{name}": shape for kind in kinds for name, shape in table.items()}
    assert tensor_shapes(runs.folder / name) == expected
    whole = {name: torch.empty(shape, dtype=torch.float64) for name, shape in expected.items()}
    load(runs.folder / name, {name: Box.whole(tensor) for name, tensor in whole.items()})
    assert digests(whole) == saved.state
    first = expected_run(CASES[name].tied).losses[:SAVED_AT]
    assert_close(saved.numbers.losses, first, relative=LOSS, name=name)


@pytest.mark.parametrize("name", NAMES)
def test_another_layouts_checkpoint_goes_on(runs: Runs, name: str) -> None:
    """The same bits, then losses, norms and parameters of a run without interruption."""
    source, result = drawn()[name], runs.resumed(name)
    assert result.found == runs.saved(source).state
    expected = expected_run(CASES[name].tied)
    assert_close(result.numbers.losses, expected.losses[SAVED_AT:], relative=LOSS, name="losses")
    assert_close(result.numbers.norms, expected.norms[SAVED_AT:], relative=GRADIENT, name="norms")
    assert result.parameters.keys() == expected.parameters.keys()
    for parameter, value in expected.parameters.items():
        assert_close(result.parameters[parameter], value, relative=GRADIENT, name=parameter)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", LAYOUTS)
def test_every_layout_loads_every_other(runs: Runs, world_size: int) -> None:
    """All pairs: the same bits. That each layout goes on from such bits, the drawn pairs show."""
    saved = {name: runs.saved(name) for name in CASES}
    results: dict[tuple[str, str], Digests] = run_ranks(
        load_all, world_size, runs.folder, tmp_path=runs.folder, timeout_seconds=1200
    )[0]
    assert results.keys() == {
        (name, source) for name in LAYOUTS[world_size] for source in others(name)
    }
    for (name, source), found in results.items():
        assert found == saved[source].state, f"{name} from {source}"
