"""Runs of many layouts for the layout matrices: each start of so many ranks trains several."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import pytest

from parallel.backend.cpu import CpuBackend
from parallel.engine import TorchEngine
from parallel.mesh import init
from tests.parallel.engine_cases import Case, build_engine, train
from tests.support.distributed import run_ranks


def make_each(
    rank: int, world_size: int, cases: dict[str, Case], make: Callable[[TorchEngine, Case], Any]
) -> dict[str, Any]:
    """What `make` makes of each layout's engine; all of it on rank 0 alone."""
    results = {}
    for name, each in cases.items():
        made = make(build_engine(init(CpuBackend(), each.parallel), each), each)
        results[name] = made if rank == 0 else None
    return results


def runs_of(
    layouts: Mapping[int, Mapping[str, Case]],
    quick: Collection[str],
    factory: pytest.TempPathFactory,
    make: Callable[[TorchEngine, Case], Any] = train,
) -> Callable[[str], Any]:
    """The run of a layout, made together with those of as many ranks that are as quick."""
    sizes = {name: world_size for world_size, cases in layouts.items() for name in cases}

    @functools.cache
    def together(world_size: int, is_quick: bool) -> dict[str, Any]:
        cases = {
            name: each for name, each in layouts[world_size].items() if (name in quick) is is_quick
        }
        folder = factory.mktemp("layouts")
        results: dict[str, Any] = run_ranks(make_each, world_size, cases, make, tmp_path=folder)[0]
        return results

    return lambda name: together(sizes[name], name in quick)[name]
