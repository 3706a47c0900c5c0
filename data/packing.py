"""One epoch of one dataset as rows of T tokens with document boundaries.

The epoch's documents are permuted and joined to one stream, the stream is cut into rows of T
tokens (the rest, below T, is dropped), and the rows are permuted. Pure functions of a key; the
permutations come from raw Philox numbers, which no library version may change.

Shape letters: R rows, T tokens a row, D documents.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.indexed import TokenShard

IGNORED_LABEL = -100
"""The label of positions without a target: a document's last token."""


@dataclass(frozen=True, slots=True)
class EpochOrder:
    """One epoch's order: documents `[D]`, where each ends in the stream `[D]`, rows `[R]`."""

    documents: NDArray[np.int64]
    ends: NDArray[np.int64]
    rows: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Rows `[R, T]` int64: tokens, next-token labels, document numbers from 0 in each row."""

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    document_ids: NDArray[np.int64]

    @classmethod
    def empty(cls, num_rows: int, sequence_length: int) -> PackedRows:
        """Unfilled rows."""
        shape = (num_rows, sequence_length)
        return cls(*(np.empty(shape, dtype=np.int64) for _ in range(3)))

    def put(self, where: NDArray[np.int64], rows: PackedRows) -> None:
        """Write `rows` at the row numbers `where`."""
        self.tokens[where] = rows.tokens
        self.labels[where] = rows.labels
        self.document_ids[where] = rows.document_ids


def permutation(count: int, *key: int | str) -> NDArray[np.int64]:
    """Permute `0 ... count - 1` as a pure function of `key`."""
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    generator = np.random.Philox(key=int.from_bytes(digest[:16], "big"))
    return np.argsort(generator.random_raw(count), kind="stable")


def epoch_order(lengths: NDArray[np.int32], sequence_length: int, *key: int | str) -> EpochOrder:
    """Order of one epoch of documents with these `lengths` `[D]`."""
    documents = permutation(len(lengths), "documents", *key)
    ends = np.cumsum(lengths[documents], dtype=np.int64)
    rows = permutation(int(ends[-1]) // sequence_length, "rows", *key)
    return EpochOrder(documents, ends, rows)


def pack_rows(
    shard: TokenShard, order: EpochOrder, rows: NDArray[np.int64], sequence_length: int
) -> PackedRows:
    """Cut the stream's rows with these numbers `[R]`.

    A label is the next token of the same document, also across the row's end; a document's last
    token has none. Work is per token in numpy and per row and piece nowhere in Python.
    """
    row_start = rows * sequence_length
    first = np.searchsorted(order.ends, row_start, side="right")
    last = np.searchsorted(order.ends, row_start + sequence_length - 1, side="right")
    pieces_per_row = last - first + 1
    row = np.repeat(np.arange(len(rows)), pieces_per_row)
    piece = np.arange(len(row)) - (np.cumsum(pieces_per_row) - pieces_per_row)[row]
    slot = first[row] + piece
    document, end = order.documents[slot], order.ends[slot]
    begin = end - shard.lengths[document]
    piece_start = np.maximum(begin, row_start[row])
    piece_end = np.minimum(end, row_start[row] + sequence_length)
    size = piece_end - piece_start
    batch_end = np.cumsum(size)
    source = shard.first_token(document) + (piece_start - begin) - (batch_end - size)

    stored = shard.tokens
    shape = (len(rows), sequence_length)
    index = np.repeat(source, size)
    index += np.arange(len(index))
    tokens = stored[index].astype(np.int64).reshape(shape)
    following = index.reshape(shape)[:, -1] + 1
    labels = np.empty_like(tokens)
    labels[:, :-1] = tokens[:, 1:]
    labels[:, -1] = stored[np.minimum(following, shard.num_tokens - 1)]
    labels.reshape(-1)[(batch_end - 1)[piece_end == end]] = IGNORED_LABEL
    return PackedRows(tokens, labels, np.repeat(piece, size).reshape(shape))


def describe_row(
    tokens: Iterable[int],
    labels: Iterable[int],
    document_ids: Iterable[int],
    decode: Callable[[list[int]], str],
    *,
    width: int = 60,
) -> str:
    """A packed row for people: one line a piece with its range, targets, beginning and end."""
    values = [np.asarray(list(column)) for column in (tokens, labels, document_ids)]
    lines = []
    for number in np.unique(values[2]):
        where = np.flatnonzero(values[2] == number)
        text = decode([int(token) for token in values[0][where]])
        if len(text) > width:
            text = f"{text[: width // 2]} ... {text[-(width // 2) :]}"
        targets = int((values[1][where] != IGNORED_LABEL).sum())
        is_last = values[1][where[-1]] == IGNORED_LABEL
        state = "ends" if is_last else "goes on"
        lines.append(
            f"document {number} [{where[0]}, {where[-1] + 1}) {targets} targets, {state}: {text!r}"
        )
    return "\n".join(lines)
