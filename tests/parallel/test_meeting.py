"""A new part of an old store: stale greetings, ranks that come late, ranks that never come."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from parallel.meeting import fresh_part, is_store_shared

SIZE = 3


def patient_store() -> dist.Store:
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=30))
    return store


def meet(store: dist.Store, ranks: list[int]) -> dict[int, dist.Store]:
    """Let ranks come in this order; the part that each was given."""
    parts: dict[int, dist.Store] = {}

    def come(rank: int) -> None:
        parts[rank] = fresh_part(store, rank=rank, size=SIZE)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return parts


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]])
def test_each_start_meets_in_a_part_of_its_own(order: list[int]) -> None:
    """What a start leaves is there for the next one, which must not see it."""
    store = patient_store()
    for start in range(3):
        parts = meet(store, order)
        assert sorted(parts) == [0, 1, 2]
        assert not any(part.check(["address"]) for part in parts.values())
        parts[start].set("address", str(start))
        assert {part.get("address") for part in parts.values()} == {str(start).encode()}


def test_a_rank_that_died_before_it_heard_is_answered_in_vain() -> None:
    store = patient_store()
    store.set("greeting/1", "a dead rank's word")
    parts = meet(store, [0, 1, 2])
    parts[0].set("address", "new")
    assert parts[1].get("address") == b"new"


@pytest.mark.parametrize(("rank", "missing"), [(0, 1), (2, 0)])
def test_a_rank_that_never_comes_is_named(rank: int, missing: int) -> None:
    store = patient_store()
    store.set_timeout(timedelta(seconds=0.3))
    with pytest.raises(RuntimeError, match=rf"rank {missing} must join within 0\.3 s of the other"):
        fresh_part(store, rank=rank, size=SIZE)


def test_alone_nobody_is_waited_for() -> None:
    assert fresh_part(dist.HashStore(), rank=0, size=1) is not None


def test_torchrun_says_that_its_store_is_shared() -> None:
    assert is_store_shared({"TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert not is_store_shared({"TORCHELASTIC_USE_AGENT_STORE": "False"})
    assert not is_store_shared({})
