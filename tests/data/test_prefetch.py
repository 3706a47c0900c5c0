from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import pytest

from data.prefetch import prefetched


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.parametrize("depth", [0, 1, 3, 100])
def test_items_come_in_order(depth: int) -> None:
    assert list(prefetched(lambda: iter(range(50)), depth)) == list(range(50))
    assert prefetch_threads() == []


@pytest.mark.parametrize("depth", [1, 4])
def test_closing_stops_and_joins_the_thread(depth: int) -> None:
    stream = prefetched(lambda: itertools.count(), depth)
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    assert len(prefetch_threads()) == 1
    stream.close()
    assert prefetch_threads() == []


def test_dropping_the_generator_joins_the_thread() -> None:
    stream = prefetched(lambda: itertools.count(), 2)
    next(stream)
    del stream
    assert prefetch_threads() == []


def test_a_generator_never_started_starts_no_thread() -> None:
    stream = prefetched(lambda: itertools.count(), 2)
    assert prefetch_threads() == []
    stream.close()


@pytest.mark.parametrize("depth", [0, 1, 5])
def test_errors_come_out_after_the_items_before_them(depth: int) -> None:
    def failing() -> Iterator[int]:
        yield 1
        yield 2
        raise OSError("disk gone")

    stream = prefetched(failing, depth)
    assert [next(stream), next(stream)] == [1, 2]
    with pytest.raises(OSError, match="disk gone"):
        next(stream)
    assert prefetch_threads() == []


@pytest.mark.parametrize("depth", [1, 3])
def test_it_runs_ahead_but_not_too_far(depth: int) -> None:
    made: list[int] = []
    reached = threading.Event()

    def counted() -> Iterator[int]:
        for index in itertools.count():
            made.append(index)
            if index == depth + 1:  # depth wait in the queue, one item is in hand
                reached.set()
            yield index

    stream = prefetched(counted, depth)
    assert next(stream) == 0
    assert reached.wait(timeout=30)
    stream.close()
    assert max(made) <= depth + 2
