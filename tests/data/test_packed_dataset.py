from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from data.packed_dataset import EPOCHS_KEPT, PackedDataset
from data.packing import PackedRows
from tests.data.prepared_folder import random_documents, unique_documents, write_folder


def dataset(folder: Path, *, sequence_length: int = 8, split: str = "train") -> PackedDataset:
    return PackedDataset(folder, key=(1, "main"), sequence_length=sequence_length, split=split)


def rows_of(data: PackedDataset, samples: list[int]) -> list[list[int]]:
    packed = PackedRows.empty(len(samples), data.sequence_length)
    data.fill(packed, np.arange(len(samples)), np.array(samples))
    return packed.tokens.tolist()  # type: ignore[no-any-return]


def test_every_epoch_covers_each_token_once_in_its_own_order(tmp_path: Path) -> None:
    documents = unique_documents([5, 17, 3, 30, 8, 2, 41])
    data = dataset(write_folder(tmp_path / "d", documents, vocab_size=20_000))
    size = data.rows_per_epoch
    assert size == 106 // 8
    epochs = [rows_of(data, list(range(e * size, (e + 1) * size))) for e in range(4)]
    for rows in epochs:
        tokens = [token for row in rows for token in row]
        assert len(tokens) == len(set(tokens)) == size * 8
    assert len({str(rows) for rows in epochs}) == 4


def test_a_row_does_not_depend_on_what_was_asked_before(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", random_documents(60))
    first, second = dataset(folder), dataset(folder)
    samples = [0, 5, 3 * first.rows_per_epoch + 1, 7 * first.rows_per_epoch, 2]
    expected = [rows_of(first, [sample])[0] for sample in samples]
    assert rows_of(second, samples) == expected
    assert rows_of(first, samples[::-1]) == expected[::-1]


def test_names_are_content_epoch_and_row(tmp_path: Path) -> None:
    data = dataset(write_folder(tmp_path / "d", random_documents(60)))
    moved = dataset(write_folder(tmp_path / "e" / "f", random_documents(60)))
    samples = np.arange(2 * data.rows_per_epoch)
    names = data.sample_ids(samples)
    assert names == moved.sample_ids(samples)
    assert len(set(names)) == len(names)
    fingerprint, epoch, row = names[-1].split(":")
    assert fingerprint == data.manifest.fingerprint[:8]
    assert (int(epoch), int(row) < data.rows_per_epoch) == (1, True)


def test_few_epoch_orders_stay_in_memory(tmp_path: Path) -> None:
    data = dataset(write_folder(tmp_path / "d", random_documents(60)))
    for epoch in range(6):
        data.order(epoch)
    assert data.order.cache_info().currsize == EPOCHS_KEPT  # type: ignore[attr-defined]
    assert data.order(5) is data.order(5)


def test_threads_may_share_a_dataset(tmp_path: Path) -> None:
    data = dataset(write_folder(tmp_path / "d", random_documents(60)))
    samples = [epoch * data.rows_per_epoch for epoch in range(8)]
    expected = rows_of(dataset(tmp_path / "d"), samples)
    found: dict[int, list[list[int]]] = {}

    def read(number: int) -> None:
        order = samples[number:] + samples[:number]
        rows = rows_of(data, order)
        found[number] = rows[-number:] + rows[:-number] if number else rows

    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(4)] == [expected] * 4


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_less_than_a_row_is_refused(tmp_path: Path, split: str) -> None:
    folder = write_folder(tmp_path / "d", [[1, 2, 0]])
    got = {"train": 3, "heldout": 0}[split]
    with pytest.raises(ValueError, match=rf"sequence_length \(8\) must be at most the {split} to.*"
                       rf"got {got}"):  # fmt: skip
        dataset(folder, split=split)


def test_a_truncated_shard_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", random_documents(60))
    whole = (folder / "train.bin").read_bytes()
    (folder / "train.bin").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"train\.bin \(\d+ bytes\) must have .*truncated"):
        dataset(folder)


def test_a_shard_of_another_folder_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", random_documents(60))
    other = write_folder(tmp_path / "e", random_documents(61))
    for name in ("train.bin", "train.idx"):
        (folder / name).write_bytes((other / name).read_bytes())
    with pytest.raises(ValueError, match="must have the manifest's size"):
        dataset(folder)


def test_a_token_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", random_documents(60))
    size = (folder / "train.bin").stat().st_size
    (folder / "train.bin").write_bytes(np.full(size // 2, 60_000, np.uint16).tobytes())
    with pytest.raises(ValueError, match=r"token id 60000\) must have ids below .*got 100"):
        rows_of(dataset(folder), [0])
