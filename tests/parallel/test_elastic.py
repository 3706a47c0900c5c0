"""Any layout goes on from what any other saved: the same bits at load, the same numbers afterwards.

Every layout of the matrix saves once, after two steps, and loads what another one saved, drawn from
a seed; the slow run goes through all pairs. The oracle is the plain model without interruption.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from parallel.mesh import init
from tests.parallel.engine_cases import (
    STEPS,
    Case,
    Run,
    build_engine,
    config_of,
    gather,
    oracle,
    train,
)
from tests.parallel.test_layout_matrix import EIGHT, FOUR, GRADIENT, LOSS, TWO, case
from tests.support.closeness import assert_close
from tests.support.distributed import run_ranks

SAVED_AT = 2
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
NAMES = [(world_size, name) for world_size, cases in LAYOUTS.items() for name in cases]
CASES = {name: each for cases in LAYOUTS.values() for name, each in cases.items()}


def others(name: str) -> list[str]:
    """The layouts whose checkpoints a layout can load: those of the same model."""
    return [other for other in CASES if other != name and CASES[other].tied == CASES[name].tied]


def drawn() -> dict[str, list[str]]:
    """One other layout for each, from a seed."""
    generator = random.Random(DRAWN_FROM)
    return {name: [generator.choice(others(name))] for name in CASES}


@dataclass(frozen=True)
class Resumed:
    """What a layout found in a checkpoint, and how it went on."""

    found: Digests
    run: Run


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


def save_all(rank: int, world_size: int, folder: Path) -> dict[str, tuple[Digests, Run]]:
    results = {}
    for name, each in LAYOUTS[world_size].items():
        mesh = init(CpuBackend(), each.parallel)
        engine = build_engine(mesh, each)
        run = train(engine, each, last=SAVED_AT)
        save(folder / name, state_of(engine), {"num_updates": engine.num_updates}, mesh=mesh)
        results[name] = digests(gather(mesh, state_of(engine))), run
    return results


def load_and_go_on(
    rank: int, world_size: int, folder: Path, sources: Mapping[str, Sequence[str]], last: int
) -> dict[tuple[str, str], Resumed]:
    """Each layout of this many ranks loads its sources, one after the other, and trains on."""
    results = {}
    for name, each in LAYOUTS[world_size].items():
        mesh = init(CpuBackend(), each.parallel)
        engine = build_engine(mesh, each, seed=None)
        for source in sources[name]:
            load(folder / source, state_of(engine), mesh=mesh)
            engine.num_updates = read_manifest(folder / source)["num_updates"]
            found = digests(gather(mesh, state_of(engine)))
            run = train(engine, each, first=SAVED_AT, last=last)
            results[name, source] = Resumed(found, run)
    return results


@dataclass(frozen=True)
class Saved:
    """The checkpoints of all layouts and what each held."""

    folder: Path
    state: dict[str, Digests]
    runs: dict[str, Run]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("elastic")
    results: dict[str, tuple[Digests, Run]] = {}
    for world_size in LAYOUTS:
        results |= run_ranks(save_all, world_size, folder, tmp_path=folder)[0]
    states = {name: state for name, (state, _) in results.items()}
    return Saved(folder, states, {name: run for name, (_, run) in results.items()})


@pytest.fixture(scope="module")
def resumed(saved: Saved) -> Any:
    @functools.cache
    def at(world_size: int) -> dict[tuple[str, str], Resumed]:
        arguments = (saved.folder, drawn(), STEPS)
        results = run_ranks(load_and_go_on, world_size, *arguments, tmp_path=saved.folder)
        first: dict[tuple[str, str], Resumed] = results[0]
        return first

    return at


@functools.cache
def expected_run(tied: bool) -> Run:
    return oracle(case(tied=tied).oracle())


def assert_goes_on(name: str, source: str, saved: Saved, result: Resumed, *, last: int) -> None:
    where = f"{name} from {source}"
    assert result.found == saved.state[source], where
    expected, run = expected_run(CASES[name].tied), result.run
    assert_close(run.losses, expected.losses[SAVED_AT:last], relative=LOSS, name=where)
    assert_close(run.norms, expected.norms[SAVED_AT:last], relative=GRADIENT, name=where)
    if last == STEPS:
        for parameter, value in expected.parameters.items():
            found = run.parameters[parameter]
            assert_close(found, value, relative=GRADIENT, name=f"{where}: {parameter}")


def test_the_layouts_are_all_kinds() -> None:
    """Every axis and schedule saves and loads; each layout's source is another one."""
    assert {"tp4", "pp4", "dp4 parameters", "hsdp 2x2", "tp2 pp2 dp2"} < CASES.keys()
    assert {"pp2 interleaved tied", "pp2 zero bubble virtual", "tp2 sequence"} < CASES.keys()
    assert len(CASES) > 35
    for name, (source,) in drawn().items():
        assert CASES[name].parallel != CASES[source].parallel


@pytest.mark.parametrize("name", CASES)
def test_files_hold_whole_parameters_and_no_padding(saved: Saved, name: str) -> None:
    """Whatever layout wrote them: true rows only, each moment beside its parameter."""
    config = config_of(CASES[name])
    table = {name: layout.global_shape for name, layout in parameter_layouts(config).items()}
    assert table["embedding.weight"] == (61, 24)
    kinds = ("model", "optimizer/exp_avg", "optimizer/exp_avg_sq")
    expected = {f"{kind}/{name}": shape for kind in kinds for name, shape in table.items()}
    assert tensor_shapes(saved.folder / name) == expected
    whole = {name: torch.empty(shape, dtype=torch.float64) for name, shape in expected.items()}
    load(saved.folder / name, {name: Box.whole(tensor) for name, tensor in whole.items()})
    assert digests(whole) == saved.state[name]
    first = expected_run(CASES[name].tied).losses[:SAVED_AT]
    assert_close(saved.runs[name].losses, first, relative=LOSS, name=name)


@pytest.mark.parametrize(("world_size", "name"), NAMES)
def test_another_layouts_checkpoint_goes_on(
    saved: Saved, resumed: Any, world_size: int, name: str
) -> None:
    (source,) = drawn()[name]
    assert_goes_on(name, source, saved, resumed(world_size)[name, source], last=STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", LAYOUTS)
def test_every_layout_loads_every_other(saved: Saved, world_size: int) -> None:
    """All pairs: the same bits, and one more step."""
    sources, last = {name: others(name) for name in CASES}, SAVED_AT + 1
    arguments = (saved.folder, sources, last)
    results = run_ranks(
        load_and_go_on, world_size, *arguments, tmp_path=saved.folder, timeout_seconds=1200
    )[0]
    assert len(results) == sum(len(others(name)) for name in LAYOUTS[world_size])
    for (name, source), result in results.items():
        assert_goes_on(name, source, saved, result, last=last)
