"""Runs an iterator ahead in a thread: bounded, errors come out where they are used, clean end."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class _Channel(Generic[Item]):
    """A bounded queue that either side can close; waits on a condition, never on a clock."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._items: deque[Item] = deque()
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._is_finished = False
        self._is_abandoned = False

    def put(self, item: Item) -> bool:
        """Add an item; False once nobody reads any more."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._items) < self._capacity or self._is_abandoned)
            self._items.append(item)
            self._changed.notify_all()
            return not self._is_abandoned

    def finish(self, error: BaseException | None) -> None:
        """No more items; `error` is raised after the last one."""
        with self._changed:
            self._is_finished, self._error = True, error
            self._changed.notify_all()

    def abandon(self) -> None:
        """Nobody reads any more."""
        with self._changed:
            self._is_abandoned = True
            self._changed.notify_all()

    def drain(self) -> Iterator[Item]:
        """Every item in order, then the error if there was one."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._items) or self._is_finished)
                if not self._items:
                    break
                item = self._items.popleft()
                self._changed.notify_all()
            yield item
        if self._error is not None:
            raise self._error


def prefetched(make: Callable[[], Iterator[Item]], depth: int) -> Generator[Item, None, None]:
    """Iterate over `make()`, which runs up to `depth` items ahead in a thread (0: no thread).

    An exception of the iterator is raised here, after the items before it. Closing the generator,
    or dropping it, stops and joins the thread.
    """
    if depth == 0:
        yield from make()
        return
    channel: _Channel[Item] = _Channel(depth)

    def run() -> None:
        error: BaseException | None = None
        try:
            for item in make():
                if not channel.put(item):
                    break
        except BaseException as caught:  # handed to the reader, who decides
            error = caught
        channel.finish(error)

    thread = threading.Thread(target=run, name="prefetch", daemon=True)
    thread.start()
    try:
        yield from channel.drain()
    finally:
        channel.abandon()
        thread.join()
