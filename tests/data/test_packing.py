from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data.indexed import ShardWriter, TokenShard
from data.packing import IGNORED_LABEL, describe_row, epoch_order, pack_rows, permutation
from tests.data.prepared_folder import random_documents, unique_documents


def shard(prefix: Path, documents: list[list[int]]) -> TokenShard:
    writer = ShardWriter(prefix, vocab_size=20_000)
    for document in documents:
        writer.add(np.array(document, dtype=np.int32))
    writer.close()
    return TokenShard(prefix)


def slow_rows(
    documents: list[list[int]], order: list[int], sequence_length: int
) -> list[tuple[list[int], list[int], list[int]]]:
    """Token by token: walk the documents, cut rows, look at the next token of the document."""
    stream: list[tuple[int, int, int]] = []
    for number in order:
        document = documents[number]
        for index, token in enumerate(document):
            is_last = index + 1 == len(document)
            stream.append((token, IGNORED_LABEL if is_last else document[index + 1], number))
    rows = []
    for start in range(0, len(stream) - sequence_length + 1, sequence_length):
        part = stream[start : start + sequence_length]
        ids: list[int] = []
        for _, _, number in part:
            seen = list(dict.fromkeys(n for _, _, n in part))
            ids.append(seen.index(number))
        rows.append(([t for t, _, _ in part], [label for _, label, _ in part], ids))
    return rows


@pytest.mark.parametrize("sequence_length", [1, 2, 7, 16, 64, 301])
@pytest.mark.parametrize("longest", [1, 5, 60])
def test_rows_equal_the_slow_walk(tmp_path: Path, sequence_length: int, longest: int) -> None:
    documents = random_documents(450, longest=longest, seed=longest)
    stored = shard(tmp_path / "train", documents)
    order = epoch_order(stored.lengths, sequence_length, "key")
    expected = slow_rows(documents, order.documents.tolist(), sequence_length)
    assert sorted(order.rows.tolist()) == list(range(len(expected)))
    found = pack_rows(stored, order, order.rows, sequence_length)
    for index, row in enumerate(order.rows.tolist()):
        tokens, labels, ids = expected[row]
        assert found.tokens[index].tolist() == tokens
        assert found.labels[index].tolist() == labels
        assert found.document_ids[index].tolist() == ids


def test_each_token_comes_once_an_epoch_except_the_tail(tmp_path: Path) -> None:
    documents = unique_documents([3, 11, 1, 40, 7, 29, 2])
    stored = shard(tmp_path / "train", documents)
    for epoch in range(3):
        order = epoch_order(stored.lengths, 8, "key", epoch)
        found = pack_rows(stored, order, order.rows, 8).tokens.reshape(-1)
        everything = {token for document in documents for token in document}
        assert len(set(found.tolist())) == len(found) == 93 // 8 * 8
        assert set(found.tolist()) < everything


def test_rows_and_documents_are_both_permuted() -> None:
    lengths = np.full(200, 5, dtype=np.int32)
    first, second = epoch_order(lengths, 4, "key", 0), epoch_order(lengths, 4, "key", 1)
    for order in (first, second):
        assert order.documents.tolist() != list(range(200))
        assert order.rows.tolist() != list(range(250))
    assert first.documents.tolist() != second.documents.tolist()
    assert first.rows.tolist() != second.rows.tolist()


def test_permutations_never_change_between_releases() -> None:
    assert permutation(12, "documents", 1, "main", "train", "abc", 0).tolist() == GOLDEN
    assert permutation(5, "a").tolist() != permutation(5, "b").tolist()
    assert sorted(permutation(1000, 1, 2).tolist()) == list(range(1000))


GOLDEN = [3, 4, 9, 8, 10, 5, 0, 7, 11, 6, 1, 2]


def test_a_row_can_be_read_by_people() -> None:
    text = describe_row(
        [1, 2, 0, 5, 6, 7, 8, 9],
        [2, 0, IGNORED_LABEL, 6, 7, 8, 9, 10],
        [0, 0, 0, 1, 1, 1, 1, 1],
        lambda ids: "".join(chr(ord("a") + token) for token in ids),
        width=4,
    )
    assert text == (
        "document 0 [0, 3) 2 targets, ends: 'bca'\n"
        "document 1 [3, 8) 5 targets, goes on: 'fg ... ij'"
    )
