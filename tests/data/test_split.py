from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from data.documents import Document
from data.indexed import TokenShard
from data.split import SplitWriter, heldout_hash


def write(
    folder: Path, documents: list[Document], fraction: float
) -> tuple[dict[str, dict[str, int]], dict[str, set[int]]]:
    """Write documents whose single token is their number; return counts and members."""
    folder.mkdir()
    writer = SplitWriter(folder, 10_000, fraction)
    for document in documents:
        number = int(document.name.rsplit(" ", 1)[-1])
        writer.add(document, np.array([number], dtype=np.int32))
    counts = writer.close()
    members = {split: set(TokenShard(folder / split).tokens.tolist()) for split in counts}
    return counts, members


def documents(count: int) -> list[Document]:
    return [Document(f"row {i}", f"text {i} é", split_key=f"file{i}") for i in range(count)]


def test_the_split_depends_on_names_and_not_on_the_order(tmp_path: Path) -> None:
    rows = documents(400)
    counts, members = write(tmp_path / "a", rows, 0.1)
    random.Random(0).shuffle(rows)
    assert write(tmp_path / "b", rows, 0.1) == (counts, members)
    assert 20 <= counts["heldout"]["documents"] <= 60
    assert members["train"] | members["heldout"] == set(range(400))
    assert not members["train"] & members["heldout"]
    assert sum(count["text_bytes"] for count in counts.values()) == sum(
        len(row.text.encode()) for row in rows
    )


def test_rows_are_split_by_their_text_so_copies_stay_together() -> None:
    one, two = Document("a:1", "same"), Document("b:7", "same")
    assert heldout_hash(one) == heldout_hash(two) != heldout_hash(Document("a:1", "other"))


@pytest.mark.parametrize("seed", range(4))
def test_a_small_source_holds_out_the_smallest_hash(tmp_path: Path, seed: int) -> None:
    rows = documents(6)
    expected = min(range(6), key=lambda i: heldout_hash(rows[i]))
    random.Random(seed).shuffle(rows)
    _, members = write(tmp_path / "a", rows, 1e-9)
    assert members == {"heldout": {expected}, "train": set(range(6)) - {expected}}


def test_nothing_is_held_out_when_asked(tmp_path: Path) -> None:
    counts, members = write(tmp_path / "a", documents(5), 0.0)
    assert list(counts) == ["train"]
    assert members["train"] == set(range(5))
    assert not (tmp_path / "a" / "heldout.bin").exists()


@pytest.mark.parametrize(("fraction", "count"), [(1.0, 3), (0.01, 1)])
def test_a_source_without_training_documents_is_refused(
    tmp_path: Path, fraction: float, count: int
) -> None:
    with pytest.raises(ValueError, match=rf"heldout_fraction \({fraction}\).*got {count} in all"):
        write(tmp_path / "a", documents(count), fraction)
