"""One prepared folder's split as an endless, pure sequence of rows, epoch after epoch."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.indexed import TokenShard
from data.packing import EpochOrder, PackedRows, epoch_order, pack_rows
from data.prepared import Manifest, check_files, read_manifest

EPOCHS_KEPT = 2
"""Epoch orders kept in memory for each dataset: a step may straddle two."""


class PackedDataset:
    """Sample j is place j mod `rows_per_epoch` of epoch j div `rows_per_epoch`.

    Raises:
        ValueError: a folder that is not prepared, is damaged, or is shorter than one row.
    """

    def __init__(
        self, path: str | Path, *, key: tuple[int | str, ...], sequence_length: int, split: str
    ) -> None:
        folder = Path(path)
        self.path = folder
        self.sequence_length = sequence_length
        self.manifest: Manifest = read_manifest(folder)
        check_files(folder, self.manifest)
        counts = self.manifest.counts.get(split, {"tokens": 0})
        self.rows_per_epoch = counts["tokens"] // sequence_length
        if self.rows_per_epoch == 0:
            raise ValueError(
                f"sequence_length ({sequence_length}) must be at most the {split} tokens of "
                f"{folder}: got {counts['tokens']}. Prepare more text or shorten the rows."
            )
        self._key = (*key, split, self.manifest.fingerprint)
        self._shard = TokenShard(folder / split)
        # safe between the prefetch thread and the caller; at worst an order is made twice
        self.order: Callable[[int], EpochOrder] = lru_cache(EPOCHS_KEPT)(self._make_order)

    def locate(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Epoch and stream row of each sample number."""
        epochs, places = np.divmod(samples, self.rows_per_epoch)
        rows = np.empty_like(samples)
        for epoch in np.unique(epochs):
            where = epochs == epoch
            rows[where] = self.order(int(epoch)).rows[places[where]]
        return epochs, rows

    def sample_ids(self, samples: NDArray[np.int64]) -> list[str]:
        """Names of samples, independent of where the folder lies."""
        name = self.manifest.fingerprint[:8]
        epochs, rows = self.locate(samples)
        return [f"{name}:{epoch}:{row}" for epoch, row in zip(epochs, rows, strict=True)]

    def fill(
        self, packed: PackedRows, where: NDArray[np.int64], samples: NDArray[np.int64]
    ) -> None:
        """Write these samples into the rows `where` of `packed`.

        Raises:
            ValueError: token ids that the vocabulary does not have (a damaged file).
        """
        epochs, rows = self.locate(samples)
        for epoch in np.unique(epochs):
            mine = np.flatnonzero(epochs == epoch)
            found = pack_rows(self._shard, self.order(int(epoch)), rows[mine], self.sequence_length)
            low, high = int(found.tokens.min()), int(found.tokens.max())
            if low < 0 or high >= self.manifest.vocab_size:
                raise ValueError(
                    f"{self.path} (token id {high if low >= 0 else low}) must have ids below its "
                    f"vocab_size: got {self.manifest.vocab_size}. A .bin file is damaged; prepare "
                    "into a new folder."
                )
            packed.put(where[mine], found)

    def _make_order(self, epoch: int) -> EpochOrder:
        return epoch_order(self._shard.lengths, self.sequence_length, *self._key, epoch)
