"""How much memory a computation takes at its peak: torch's profiler sums the allocator's events.

The profiler sees what the thread that started it allocates and frees. A tensor of a collective may
be freed by a thread of the process group, just after the collective, and nobody sees it. So only
what is seen to be freed counts: each measurement may come out a little low, and the largest of a
few is right.
"""

from __future__ import annotations

import contextlib
import gc
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch.profiler import ProfilerActivity, profile

MEMORY_EVENT = "[memory]"


def resting_bytes() -> int:
    """Bytes of all distinct storages of CPU tensors that Python knows."""
    gc.collect()
    sizes: dict[int, int] = {}
    for each in gc.get_objects():
        # Not isinstance: that would ask proxies of other libraries for their class.
        if issubclass(type(each), torch.Tensor) and each.device.type == "cpu":
            with contextlib.suppress(NotImplementedError, RuntimeError):
                # A tensor that only wraps others has no storage of its own.
                storage = each.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def peak_bytes(work: Callable[[], object], *, repeats: int = 1) -> int:
    """Most bytes that exist at once while `work` runs, beyond what existed before it.

    `work` must free whatever it allocates, and nothing that existed before.
    """
    return max(peak_of(_events(work)) for _ in range(repeats))


def _events(work: Callable[[], object]) -> list[int]:
    """Bytes allocated (negative: freed) while `work` runs, in order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    assert results is not None
    events = [event for event in results.events() if event.name() == MEMORY_EVENT]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def peak_of(events: Sequence[int]) -> int:
    """Largest sum of what is freed later on; an allocation without its freeing does not count."""
    waiting: dict[int, int] = defaultdict(int)
    total = peak = 0
    # Backwards in time a freed block begins to exist and an allocated one ends.
    for size in reversed(events):
        if size < 0:
            waiting[-size] += 1
            total -= size
            peak = max(peak, total)
        elif waiting[size]:
            waiting[size] -= 1
            total -= size
    return peak
