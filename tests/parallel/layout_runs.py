"""Runs of many layouts for the layout matrices: each start of so many ranks trains several."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping

import pytest

from parallel.backend.cpu import CpuBackend
from parallel.mesh import init
from tests.parallel.engine_cases import Case, Run, build_engine, train
from tests.support.distributed import run_ranks


def train_each(rank: int, world_size: int, cases: dict[str, Case]) -> dict[str, Run | None]:
    results: dict[str, Run | None] = {}
    for name, each in cases.items():
        run = train(build_engine(init(CpuBackend(), each.parallel), each), each)
        results[name] = run if rank == 0 else None
    return results


def runs_of(
    layouts: Mapping[int, Mapping[str, Case]],
    quick: Collection[str],
    factory: pytest.TempPathFactory,
) -> Callable[[str], Run]:
    """The run of a layout, made together with those of as many ranks that are as quick."""
    sizes = {name: world_size for world_size, cases in layouts.items() for name in cases}

    @functools.cache
    def together(world_size: int, is_quick: bool) -> dict[str, Run]:
        cases = {
            name: each for name, each in layouts[world_size].items() if (name in quick) is is_quick
        }
        folder = factory.mktemp("layouts")
        results: dict[str, Run] = run_ranks(train_each, world_size, cases, tmp_path=folder)[0]
        return results

    return lambda name: together(sizes[name], name in quick)[name]
