"""The ranks themselves: results in order, failures under their rank, nothing left behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.support.distributed import RankError, run_ranks


def add_ranks(rank: int, world_size: int, base: int) -> tuple[int, float, torch.Tensor]:
    total = torch.tensor(float(rank + base))
    dist.all_reduce(total)
    return rank, float(total), torch.full((2,), float(rank))


def fail_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("the second rank is unhappy")
    dist.barrier()


def leave_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(7)
    dist.barrier()


def test_results_come_back_in_rank_order(tmp_path: Path) -> None:
    results = run_ranks(add_ranks, 3, 10, tmp_path=tmp_path)
    assert [rank for rank, _, _ in results] == [0, 1, 2]
    assert [total for _, total, _ in results] == [33.0, 33.0, 33.0]
    assert torch.equal(results[2][2], torch.full((2,), 2.0))


def test_an_exception_names_its_rank(tmp_path: Path) -> None:
    with pytest.raises(
        RankError, match=r"(?s)rank 1 of 2:.*ValueError: the second rank is unhappy"
    ):
        run_ranks(fail_on_one, 2, tmp_path=tmp_path)


def test_a_lost_process_is_reported(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="rank 1 died with exit status 7"):
        run_ranks(leave_on_one, 2, tmp_path=tmp_path)
