from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from data.mixture import Mixture


def by_sorting(weights: list[int], count: int) -> list[tuple[int, int]]:
    """The definition, in exact arithmetic."""
    total = sum(weights)
    due = [
        (Fraction(2 * sample + 1, 2) * total / weight, dataset, sample)
        for dataset, weight in enumerate(weights)
        for sample in range(count)
    ]
    return [(dataset, sample) for _, dataset, sample in sorted(due)[:count]]


@pytest.mark.parametrize("weights", [[1], [1, 1], [1, 3], [3, 1], [1, 1, 2], [5, 2, 1], [1, 7, 8]])
def test_the_order_is_the_merge_of_due_times(weights: list[int]) -> None:
    dataset, sample = Mixture(weights).locate(0, 200)
    assert list(zip(dataset.tolist(), sample.tolist(), strict=True)) == by_sorting(weights, 200)


WEIGHTS = [
    [0.3, 0.7],
    [1e-4, 1.0],
    [0.2, 0.3, 0.5],
    [1.0, 1.0, 1.0],
    [0.1] * 10,
    [0.05, 0.9, 0.01, 0.04],
    [1, 2, 3, 4, 5, 6, 7],
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_shares_are_right_at_every_prefix(weights: list[float]) -> None:
    count = 3000
    dataset, _ = Mixture(weights).locate(0, count)
    share = np.array(weights) / np.sum(weights)
    taken = np.cumsum(np.eye(len(weights))[dataset], axis=0)
    wanted = np.arange(1, count + 1)[:, None] * share
    distance = np.abs(taken - wanted)
    assert (distance <= 0.5 + share * len(weights) / 2 + 1e-9).all()
    assert distance.max() < 1.0 + 1e-9


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_any_stretch_is_a_part_of_the_whole(weights: list[float]) -> None:
    mixture = Mixture(weights)
    dataset, sample = mixture.locate(0, 600)
    for start, count in ((0, 1), (1, 7), (37, 64), (250, 1), (590, 10)):
        part_dataset, part_sample = mixture.locate(start, count)
        assert part_dataset.tolist() == dataset[start : start + count].tolist()
        assert part_sample.tolist() == sample[start : start + count].tolist()
    for number in range(len(weights)):
        mine = sample[dataset == number]
        assert mine.tolist() == list(range(len(mine)))


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_far_positions_are_consistent(weights: list[float]) -> None:
    mixture = Mixture(weights)
    start = 10**11 + 12345
    dataset, sample = mixture.locate(start, 50)
    share = np.array(weights) / np.sum(weights)
    assert np.abs(sample - start * share[dataset]).max() < 60
    again = [mixture.locate(start + index, 1) for index in range(50)]
    assert [int(d[0]) for d, _ in again] == dataset.tolist()
    assert [int(s[0]) for _, s in again] == sample.tolist()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([], "at least one dataset"),
        ([1.0, 0.0], r"weight 1 \(0.0\) must be a number above 0"),
        ([-1.0], r"weight 0 \(-1.0\)"),
        ([1.0, float("nan")], r"weight 1 \(nan\)"),
        ([float("inf")], r"weight 0 \(inf\)"),
    ],
)
def test_impossible_weights_are_refused(weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixture(weights)
