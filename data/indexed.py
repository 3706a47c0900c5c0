"""Token shards on disk in megatron-core's indexed format: its builder writes, a small reader reads.

`<prefix>.idx` is a header, then an int32 length and an int64 byte offset of every document, then
int64 document bounds; `<prefix>.bin` holds the tokens. The reader is ours because the library's
unmaps its file while arrays still point into it (a crash, not an error) and because importing it
loads thousands of modules in every process that trains; a test reads each other's files.
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
import warnings
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_DTYPES = {4: np.int32, 8: np.uint16}
"""The library's codes of the types that we store."""


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """The narrowest stored type: the library's rule."""
    with _library() as library:
        kind: type[np.uint16] | type[np.int32] = library.DType.optimal_dtype(vocab_size)
    return kind


class ShardWriter:
    """Writes `<prefix>.bin` document by document and `<prefix>.idx` at the end."""

    def __init__(self, prefix: Path, *, vocab_size: int) -> None:
        self.prefix = prefix
        self.num_documents = 0
        self.num_tokens = 0
        self._vocab_size = vocab_size
        dtype = token_dtype(vocab_size)
        with _library() as library:
            self._builder = library.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
        # the builder keeps every length; as arrays they take 12 bytes a document, not 64
        self._builder.sequence_lengths = array("i")
        self._builder.document_indices = array("q", [0])

    def add(self, tokens: NDArray[np.int32]) -> None:
        """Append one document.

        Raises:
            ValueError: a token id outside the vocabulary.
        """
        if tokens.min() < 0 or tokens.max() >= self._vocab_size:
            raise ValueError(
                f"token id ({tokens.max()}) must be below vocab_size: got {self._vocab_size}. "
                "The tokenizer's files do not belong together."
            )
        self._builder.add_document(tokens, [len(tokens)])
        self.num_documents += 1
        self.num_tokens += len(tokens)

    def close(self) -> None:
        """Write the index; the shard is complete afterwards."""
        self._builder.finalize(f"{self.prefix}.idx")

    def abandon(self) -> None:
        """Close the file without an index, after an error."""
        self._builder.data_file.close()


class TokenShard:
    """A finished shard, memory-mapped: lengths of its documents and their tokens.

    Raises:
        ValueError: files that are missing, or do not fit each other.
    """

    def __init__(self, prefix: Path) -> None:
        index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        for path in (index, tokens):
            if not path.is_file():
                raise ValueError(f"{path} must exist: prepare the data again.")
        dtype, self.num_documents = _read_header(index)
        count, start = self.num_documents, _HEADER.size
        self.lengths: NDArray[np.int32] = np.memmap(index, np.int32, "r", start, count)
        self._pointers = np.memmap(index, np.int64, "r", start + 4 * count, count)
        self.num_tokens = int(self.lengths.sum(dtype=np.int64))
        expected, size = self.num_tokens * dtype.itemsize, tokens.stat().st_size
        if size != expected:
            raise ValueError(
                f"{tokens} ({size} bytes) must have the size its index says: got {expected}. "
                "It is truncated or of another index; prepare the data again."
            )
        self.tokens: NDArray[Any] = np.memmap(tokens, dtype, "r")

    def first_token(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where these documents begin in `tokens`."""
        pointers: NDArray[np.int64] = self._pointers[documents]
        return pointers // self.tokens.itemsize


def _read_header(index: Path) -> tuple[np.dtype[Any], int]:
    """Token type and number of documents of an index whose size agrees with its header."""
    with index.open("rb") as stream:
        head = stream.read(_HEADER.size)
        size = os.fstat(stream.fileno()).st_size
    if len(head) < _HEADER.size or not head.startswith(_MAGIC):
        raise ValueError(f"{index} must be a token index: its header is damaged.")
    _, version, code, sequences, documents = _HEADER.unpack(head)
    if version != 1 or code not in _DTYPES:
        raise ValueError(
            f"{index} must be a token index of version 1 with a known type: "
            f"got version {version}, type {code}. Prepare the data again."
        )
    expected = _HEADER.size + sequences * (4 + 8) + documents * 8
    if size != expected or sequences < 1:
        raise ValueError(f"{index} ({size} bytes) must have {expected}: it is truncated.")
    return np.dtype(_DTYPES[code]), sequences


@contextlib.contextmanager
def _library() -> Iterator[ModuleType]:
    """megatron's module, without its import warnings and its lines about every file."""
    talker = logging.getLogger("megatron")
    level = talker.level
    talker.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import megatron.core.datasets.indexed_dataset as library
        yield library
    finally:
        talker.setLevel(level)
