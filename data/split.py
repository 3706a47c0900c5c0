"""Which documents are held out, and the two shards they are written to."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.corpus import unit_hash
from data.documents import Document
from data.indexed import ShardWriter


def heldout_hash(document: Document) -> float:
    """A number in [0, 1) that depends only on the document's name (rows: on its text)."""
    key = document.text if document.split_key is None else document.split_key
    return unit_hash("heldout", key)


def no_training_document(heldout_fraction: float, num_documents: int) -> ValueError:
    """The error for a source whose every document is held out."""
    return ValueError(
        f"heldout_fraction ({heldout_fraction}) must leave a training document: "
        f"got {num_documents} in all. Give more documents or set heldout_fraction=0."
    )


@dataclass(slots=True)
class SplitWriter:
    """Sends each document to `train` or `heldout`.

    Held out are the documents whose hash is below `heldout_fraction`, whatever their order; when
    there is none, the one with the smallest hash, so that a small source has a held-out part too.
    """

    folder: Path
    vocab_size: int
    heldout_fraction: float
    text_bytes: dict[str, int] = field(default_factory=lambda: {"train": 0, "heldout": 0})
    _writers: dict[str, ShardWriter] = field(default_factory=dict)
    _smallest: tuple[float, NDArray[np.int32], int] | None = None

    def add(self, document: Document, tokens: NDArray[np.int32]) -> None:
        """Store one document's tokens."""
        size = len(document.text.encode())
        position = heldout_hash(document)
        if position < self.heldout_fraction:
            self._write("heldout", tokens, size)
            return
        if "heldout" not in self._writers and self.heldout_fraction > 0:
            waiting, held = self._smallest, (position, tokens, size)
            if waiting is None:
                self._smallest = held
                return
            if position < waiting[0]:
                self._smallest, (_, tokens, size) = held, waiting
        self._write("train", tokens, size)

    def close(self) -> dict[str, dict[str, int]]:
        """Finish both shards and return their counts.

        Raises:
            ValueError: no training document is left.
        """
        if self._smallest is not None:
            split = "train" if "heldout" in self._writers else "heldout"
            self._write(split, *self._smallest[1:])
            self._smallest = None
        total = sum(writer.num_documents for writer in self._writers.values())
        if total and "train" not in self._writers:
            self.abandon()
            raise no_training_document(self.heldout_fraction, total)
        for writer in self._writers.values():
            writer.close()
        return {
            split: {
                "documents": writer.num_documents,
                "tokens": writer.num_tokens,
                "text_bytes": self.text_bytes[split],
            }
            for split, writer in sorted(self._writers.items())
        }

    def abandon(self) -> None:
        """Close the files after an error."""
        for writer in self._writers.values():
            writer.abandon()

    def _write(self, split: str, tokens: NDArray[np.int32], size: int) -> None:
        if split not in self._writers:
            self._writers[split] = ShardWriter(self.folder / split, vocab_size=self.vocab_size)
        self._writers[split].add(tokens)
        self.text_bytes[split] += size
