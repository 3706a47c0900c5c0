"""Rows that travel to their experts' ranks and back, against the arithmetic of one process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from models.grouped_linear import Groups
from parallel.collective_count import CollectiveCount
from parallel.row_routes import Integers, find_route, from_experts, to_experts
from tests.support.distributed import run_ranks

RANKS = 4
OWN = 3
EXPERTS = RANKS * OWN
WIDTH = 5


@dataclass(frozen=True)
class Case:
    """Rows of each rank for each expert; with `scales` they are spikes, on some rank too large."""

    counts: list[list[int]]
    dtype: torch.dtype = torch.float64
    length: int | None = None
    scales: torch.dtype | None = None
    largest: int = 127


def drawn(seed: int, most: int = 4) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    table: list[list[int]] = torch.randint(most, (RANKS, EXPERTS), generator=generator).tolist()
    return table


def to_one(expert: int) -> list[list[int]]:
    return [[7 if each == expert else 0 for each in range(EXPERTS)] for _ in range(RANKS)]


SILENT = [[0] * EXPERTS, *drawn(1)[1:]]
"""The first rank has no row."""
UNVISITED = [[0 if expert < OWN else count for expert, count in enumerate(row)] for row in drawn(2)]
"""The first rank's experts get none."""
CASES: dict[str, Case] = {
    "drawn": Case(drawn(0)),
    "float32": Case(drawn(3), torch.float32),
    "bfloat16": Case(drawn(4), torch.bfloat16),
    "a rank without rows": Case(SILENT),
    "a rank without visits": Case(UNVISITED),
    "all to one": Case(to_one(7)),
    "nothing at all": Case([[0] * EXPERTS] * RANKS),
    "equal lengths": Case([[3] * EXPERTS] * RANKS, length=3),
    "spikes": Case(drawn(5), scales=torch.float64),
    "spikes float32": Case(drawn(6), torch.float32, scales=torch.float32),
    "spikes bfloat16": Case(drawn(7), torch.bfloat16, scales=torch.float32),
    "spikes of equal lengths": Case([[2] * EXPERTS] * RANKS, length=2, scales=torch.float64),
    "spikes from a rank without rows": Case(SILENT, scales=torch.float64),
    "spikes too large on one rank": Case(drawn(8), scales=torch.float64, largest=128),
    "spikes too large, equal lengths": Case(
        [[1] * EXPERTS] * RANKS, length=1, scales=torch.float64, largest=128
    ),
}


def rows_of(case: Case, rank: int) -> tuple[Tensor, Tensor | None]:
    """A rank's rows, sorted by expert, and what each is whole multiples of."""
    generator = torch.Generator().manual_seed(100 + rank)
    count = sum(case.counts[rank])
    whole = torch.randint(-127, 128, (count, WIDTH), generator=generator)
    if case.scales is None:
        return whole.to(case.dtype), None
    if count and rank == RANKS - 1:
        whole[0, 0] = case.largest
    scale = torch.rand(count, 1, generator=generator, dtype=case.scales) + 0.1
    return (whole * scale).to(case.dtype), scale


def gradients_of(case: Case, rank: int, num_rows: int) -> Tensor:
    """What a rank's experts answer with."""
    generator = torch.Generator().manual_seed(200 + rank)
    return torch.randint(-9, 10, (num_rows, WIDTH), generator=generator).to(case.dtype)


def travel(case: Case, rank: int, group: dist.ProcessGroup) -> dict[str, Any]:
    """There and home again; the experts double, and give a gradient of their own back."""
    rows, scale = rows_of(case, rank)
    rows.requires_grad_()
    groups = Groups(torch.tensor(case.counts[rank]), length=case.length)
    integers = None if scale is None else Integers.of(rows.detach(), scale)
    route, are_exact = find_route(groups, group, integers)
    with CollectiveCount() as collectives:
        arrived = to_experts(rows, route, integers if are_exact else None)
    home = from_experts(2 * arrived, route)
    (gradient,) = torch.autograd.grad(home, rows, gradients_of(case, rank, rows.shape[0]))
    answer = gradients_of(case, rank, arrived.shape[0])
    (answered,) = torch.autograd.grad(to_experts(rows, route), rows, answer)
    return {
        "arrived": arrived.detach(), "counts": route.counts, "home": home.detach(),
        "gradient": gradient, "answered": answered, "exact": are_exact,
        "bytes": collectives.bytes["all-to-all"],
    }  # fmt: skip


def travel_all(rank: int, world_size: int) -> dict[str, dict[str, Any]]:
    group = dist.group.WORLD
    assert group is not None
    return {name: travel(case, rank, group) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def travelled(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder: Path = tmp_path_factory.mktemp("routes")
    return run_ranks(travel_all, RANKS, tmp_path=folder)


def of_expert(case: Case, values: list[Tensor], expert: int) -> list[Tensor]:
    """Each rank's rows for one expert."""
    return [rows.split(counts)[expert] for rows, counts in zip(values, case.counts, strict=True)]


@pytest.mark.parametrize("name", CASES)
def test_rows_reach_their_experts_in_the_order_of_ranks(travelled: list[Any], name: str) -> None:
    case = CASES[name]
    sent = [rows_of(case, rank)[0] for rank in range(RANKS)]
    for rank, result in enumerate(travelled):
        experts = range(rank * OWN, (rank + 1) * OWN)
        parts = [part for expert in experts for part in of_expert(case, sent, expert)]
        assert torch.equal(result[name]["arrived"], torch.cat(parts))
        sums = [sum(counts[expert] for counts in case.counts) for expert in experts]
        assert result[name]["counts"].tolist() == sums


@pytest.mark.parametrize("name", CASES)
def test_outputs_come_home_and_gradients_go_back(travelled: list[Any], name: str) -> None:
    """Doubling is every row's own; what experts answer with reaches the row that it is of."""
    case = CASES[name]
    answers = [gradients_of(case, r, result[name]["arrived"].shape[0])
               for r, result in enumerate(travelled)]  # fmt: skip
    for rank, result in enumerate(travelled):
        rows, _ = rows_of(case, rank)
        assert torch.equal(result[name]["home"], 2 * rows)
        assert torch.equal(result[name]["gradient"], 2 * gradients_of(case, rank, rows.shape[0]))
        expected = []
        for expert in range(EXPERTS):
            sums = [
                sum(counts[each] for counts in case.counts)
                for each in range(expert // OWN * OWN, (expert // OWN + 1) * OWN)
            ]
            of_this = answers[expert // OWN].split(sums)[expert % OWN]
            expected.append(of_this.split([counts[expert] for counts in case.counts])[rank])
        assert torch.equal(result[name]["answered"], torch.cat(expected))


@pytest.mark.parametrize("name", CASES)
def test_spikes_travel_as_bytes_where_all_of_them_fit(travelled: list[Any], name: str) -> None:
    """One count that does not fit, on one rank, and every rank sends plain rows."""
    case = CASES[name]
    are_bytes = case.scales is not None and case.largest <= 127
    for rank, result in enumerate(travelled):
        assert result[name]["exact"] is are_bytes
        width = WIDTH * case.dtype.itemsize
        if are_bytes and case.scales is not None:
            width = WIDTH + case.scales.itemsize
        assert result[name]["bytes"] == sum(case.counts[rank]) * width


def test_fractions_are_no_integers() -> None:
    """Spikes that are blended with what they stand for."""
    scale = torch.tensor([[0.5], [0.25]])
    whole = torch.tensor([[1.0, -2.5], [0.25, 31.75]])
    assert Integers.of(whole, scale).are_exact
    assert Integers.of(whole, scale).values.tolist() == [[2, -5], [1, 127]]
    assert not Integers.of(whole + torch.tensor([[0.0, 0.0], [0.0, 0.25]]), scale).are_exact
    assert not Integers.of(whole + torch.tensor([[0.0, 1e-3], [0.0, 0.0]]), scale).are_exact
