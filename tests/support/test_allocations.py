"""The memory counter on computations whose allocations are known."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.support.allocations import peak_bytes, peak_of, resting_bytes


def test_the_peak_is_the_most_that_exists_at_once() -> None:
    def work() -> None:
        first = torch.empty(1000)
        second = torch.empty(500)
        del first
        third = torch.empty(700)
        del second, third

    assert peak_bytes(work) == 4 * 1500
    assert peak_bytes(lambda: torch.empty(300) + torch.empty(300)) == 4 * 900


def test_what_was_there_before_does_not_count() -> None:
    held = torch.empty(1000)
    assert peak_bytes(lambda: (held + held).sum()) == 4 * 1000 + 4
    assert peak_bytes(lambda: held.zero_()) == 0


def test_what_is_never_seen_to_be_freed_does_not_count() -> None:
    assert peak_of([5, 7, -5, -7]) == 12
    assert peak_of([5, -5, 7, -7]) == 7
    # The second block of 5 is freed by somebody else.
    assert peak_of([5, -5, 5, 7, -7]) == 7
    assert peak_of([5, 3, 5, -5, -3]) == 8
    assert peak_of([]) == 0


def test_resting_bytes_count_storages_once() -> None:
    before = resting_bytes()
    tensor = torch.zeros(1000, dtype=torch.float64)
    views: list[Tensor] = [tensor[10:], tensor.view(10, 100)]
    assert resting_bytes() - before == 8000
    del tensor, views
    assert resting_bytes() == before
