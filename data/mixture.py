"""In which order several datasets take turns: a pure, unbounded sequence for given weights.

Sample j of dataset d is due at time (j + 0.5) / weight_d, and the mixture is all samples by due
time (ties: the dataset listed first). Each dataset's share is therefore even at every scale, and
what comes at position n depends on the weights alone, not on lengths, epochs or earlier calls.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class Mixture:
    """Positions of a weighted mixture -> (dataset, sample of that dataset).

    Of the first n samples dataset d has n * w_d of them to within 0.5 + w_d * (datasets) / 2, w
    being the weights divided by their sum.

    Raises:
        ValueError: no dataset, or a weight that is not a positive number.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        values = np.asarray(weights, dtype=np.float64)
        if values.size == 0:
            raise ValueError("mixture must name at least one dataset: got none.")
        for index, weight in enumerate(values):
            if not (np.isfinite(weight) and weight > 0):
                raise ValueError(f"mixture weight {index} ({weight}) must be a number above 0.")
        self._weights = values / values.sum()

    def locate(self, start: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Dataset and sample numbers `[count]` at positions `start` ... `start + count - 1`.

        Cost: O(count + datasets), wherever `start` is.
        """
        num = len(self._weights)
        if num == 1:
            return np.zeros(count, dtype=np.int64), np.arange(start, start + count, dtype=np.int64)
        # Counts before time t sum to t within num / 2, so these times enclose the positions, with
        # one sample to spare for rounding.
        first = self._counts_before(max(0.0, start - num / 2 - 1.0))
        last = self._counts_before(start + count + num / 2 + 1.0)
        sizes = last - first
        dataset = np.repeat(np.arange(num), sizes)
        offset = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        sample = first[dataset] + offset
        order = np.lexsort((dataset, self._due(dataset, sample)))
        skip = start - int(first.sum())
        taken = order[skip : skip + count]
        return dataset[taken].astype(np.int64), sample[taken]

    def _due(self, dataset: NDArray[np.int64], sample: NDArray[np.int64]) -> NDArray[np.float64]:
        due: NDArray[np.float64] = (sample + 0.5) / self._weights[dataset]
        return due

    def _counts_before(self, time: float) -> NDArray[np.int64]:
        """How many samples of each dataset are due before `time`, give or take rounding."""
        counts: NDArray[np.int64] = np.floor(self._weights * time + 0.5).astype(np.int64)
        return counts
