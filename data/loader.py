"""Prepared folders -> batches: the sample at position i of step s of a stage, and nothing else.

Everything here is a pure function of (seed, stage, step, position) and of the data's content: no
ranks but two integers, no state, no history.

Shape letters: R rows, T tokens a row.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.mixture import Mixture
from data.packed_dataset import PackedDataset
from data.packing import PackedRows
from data.prefetch import prefetched

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of tokens `[R, T]` int64.

    `labels` hold the next token of the same document (-100: none), `document_ids` number the pieces
    of each row from 0, `sample_ids` `[R]` name the rows as `fingerprint:epoch:row`.
    """

    tokens: Tensor
    labels: Tensor
    document_ids: Tensor
    sample_ids: tuple[str, ...]


class StageData:
    """The samples of one stage: a weighted mixture of prepared folders, packed into rows.

    `sources` maps folders to weights. Step s holds positions `s * rows_per_step` onwards of the
    mixture, on however many ranks.

    Raises:
        ValueError: unusable folders or weights, or folders with different tokenizers.
    """

    def __init__(  # noqa: PLR0913 - each one is a part of what decides the order
        self,
        sources: Mapping[str, float],
        *,
        seed: int,
        stage: str,
        sequence_length: int,
        rows_per_step: int,
        split: str = "train",
    ) -> None:
        for name, value in (("sequence_length", sequence_length), ("rows_per_step", rows_per_step)):
            if value < 1:
                raise ValueError(f"{name} ({value}) must be at least 1.")
        self.sequence_length = sequence_length
        self.rows_per_step = rows_per_step
        self._mixture = Mixture(list(sources.values()))
        self._datasets = [
            PackedDataset(path, key=(seed, stage), sequence_length=sequence_length, split=split)
            for path in sources
        ]
        self._check_tokenizers()
        facts = {
            "datasets": [dataset.manifest.fingerprint for dataset in self._datasets],
            "weights": [float(weight) for weight in sources.values()],
            "seed": seed,
            "stage": stage,
            "split": split,
            "sequence_length": sequence_length,
            "rows_per_step": rows_per_step,
        }
        self.fingerprint: str = hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        """Vocabulary of the tokenizer that all sources share."""
        return self._datasets[0].manifest.vocab_size

    @property
    def eos_token_id(self) -> int:
        """The token that ends each document."""
        return self._datasets[0].manifest.eos_token_id

    @property
    def tokenizer_sha256(self) -> str:
        """Hash of the tokenizer that all sources share."""
        return self._datasets[0].manifest.tokenizer_sha256

    def check_model(self, vocab_size: int) -> None:
        """Refuse a model that has no embedding for some token.

        Raises:
            ValueError: `vocab_size` below the data's.
        """
        if vocab_size < self.vocab_size:
            raise ValueError(
                f"model.vocab_size ({vocab_size}) must be at least that of the data's tokenizer: "
                f"got {self.vocab_size} in {self._datasets[0].path}. Set model.vocab_size or "
                "prepare the data with the model's tokenizer."
            )

    def sample_ids(self, step: int) -> tuple[str, ...]:
        """Names of all rows of a step, on all ranks, in order."""
        return self._names(step * self.rows_per_step, self.rows_per_step)

    def batch(self, step: int, *, rank: int = 0, size: int = 1) -> Batch:
        """The rows of one rank of `size`: a contiguous block of the step's rows.

        Raises:
            ValueError: rows that do not divide among the ranks.
        """
        share, rest = divmod(self.rows_per_step, size)
        if rest or not 0 <= rank < size:
            raise ValueError(
                f"rows_per_step ({self.rows_per_step}) must be a multiple of the data-parallel "
                f"ranks: got rank {rank} of {size}. Change global_batch_tokens or parallel.dp."
            )
        start = step * self.rows_per_step + rank * share
        numbers, samples = self._mixture.locate(start, share)
        packed = PackedRows.empty(share, self.sequence_length)
        for number in np.unique(numbers):
            where = np.flatnonzero(numbers == number)
            self._datasets[number].fill(packed, where, samples[where])
        return _batch(packed, self._names(start, share))

    def stream(
        self, start_step: int, *, rank: int = 0, size: int = 1, prefetch: int = 0
    ) -> Generator[Batch, None, None]:
        """Batches of `start_step` and all later steps, `prefetch` of them built ahead in a thread.

        Close it when done: that joins the thread.
        """

        def batches() -> Generator[Batch, None, None]:
            step = start_step
            while True:
                yield self.batch(step, rank=rank, size=size)
                step += 1

        return prefetched(batches, prefetch)

    def _names(self, start: int, count: int) -> tuple[str, ...]:
        numbers, samples = self._mixture.locate(start, count)
        names = [""] * count
        for number in np.unique(numbers):
            where = np.flatnonzero(numbers == number)
            for index, name in zip(
                where, self._datasets[number].sample_ids(samples[where]), strict=True
            ):
                names[index] = name
        return tuple(names)

    def _check_tokenizers(self) -> None:
        first = self._datasets[0]
        for other in self._datasets[1:]:
            found, wanted = other.manifest.tokenizer_sha256, first.manifest.tokenizer_sha256
            if found != wanted:
                raise ValueError(
                    f"data.mixture: {other.path} (tokenizer {found[:12]}) must have the tokenizer "
                    f"of {first.path}: got {wanted[:12]}. Prepare both with tokenizer=..."
                )


def heldout_rows(path: str | Path, *, sequence_length: int, rows: int) -> Batch:
    """The first `rows` rows of the held-out documents in a fixed order, for evaluation.

    A shorter held-out part gives fewer rows, with a warning.

    Raises:
        ValueError: a folder without held-out documents, or with less than one row of them.
    """
    if rows < 1:
        raise ValueError(f"rows ({rows}) must be at least 1.")
    dataset = PackedDataset(
        path, key=("heldout rows",), sequence_length=sequence_length, split="heldout"
    )
    taken = min(rows, dataset.rows_per_epoch)
    if taken < rows:
        logger.warning(
            "%s holds %d held-out rows of %d tokens: evaluating those, not %d",
            path, taken, sequence_length, rows,
        )  # fmt: skip
    samples = np.arange(taken, dtype=np.int64)
    packed = PackedRows.empty(taken, sequence_length)
    dataset.fill(packed, samples, samples)
    return _batch(packed, tuple(dataset.sample_ids(samples)))


def _batch(packed: PackedRows, sample_ids: tuple[str, ...]) -> Batch:
    return Batch(
        tokens=torch.from_numpy(packed.tokens),
        labels=torch.from_numpy(packed.labels),
        document_ids=torch.from_numpy(packed.document_ids),
        sample_ids=sample_ids,
    )
