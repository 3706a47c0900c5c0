from __future__ import annotations

import logging
import random
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from data.loader import Batch, StageData, heldout_rows
from data.packing import IGNORED_LABEL
from tests.data.prepared_folder import random_documents, write_folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("folders")
    return [
        str(
            write_folder(
                root / str(index), random_documents(count, seed=index),
                heldout=random_documents(20, seed=9 + index),
            )
        )
        for index, count in enumerate([40, 90, 15])
    ]  # fmt: skip


def stage(sources: Mapping[str, float], **changes: Any) -> StageData:
    arguments: dict[str, Any] = {
        "seed": 1, "stage": "main", "sequence_length": 16, "rows_per_step": 12,
    }  # fmt: skip
    return StageData(sources, **{**arguments, **changes})


def mixed(folders: list[str], **changes: Any) -> StageData:
    return stage(dict(zip(folders, [0.5, 0.3, 0.2], strict=True)), **changes)


def same(one: Batch, other: Batch) -> bool:
    return (
        torch.equal(one.tokens, other.tokens)
        and torch.equal(one.labels, other.labels)
        and torch.equal(one.document_ids, other.document_ids)
        and one.sample_ids == other.sample_ids
    )


def test_a_batch_is_rows_of_int64(folders: list[str]) -> None:
    batch = mixed(folders).batch(0)
    for tensor in (batch.tokens, batch.labels, batch.document_ids):
        assert tensor.shape == (12, 16)
        assert tensor.dtype == torch.int64
    assert len(batch.sample_ids) == 12
    inner = batch.labels[:, :-1]
    assert bool(((inner == batch.tokens[:, 1:]) | (inner == IGNORED_LABEL)).all())
    changes = batch.document_ids[:, 1:] != batch.document_ids[:, :-1]
    assert bool((inner[changes] == IGNORED_LABEL).all())
    assert bool((batch.tokens[:, :-1][inner == IGNORED_LABEL] == 0).all())
    assert bool((batch.document_ids[:, 0] == 0).all())


def test_a_step_does_not_depend_on_the_order_of_calls(folders: list[str]) -> None:
    steps = list(range(30))
    data = mixed(folders)
    in_order = {step: data.batch(step) for step in steps}
    random.Random(0).shuffle(steps)
    again = mixed(folders)
    for step in steps:
        assert same(again.batch(step), in_order[step])
        assert again.sample_ids(step) == in_order[step].sample_ids


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 12])
def test_the_ranks_rows_join_to_the_step(folders: list[str], size: int) -> None:
    data = mixed(folders)
    for step in (0, 7):
        whole = data.batch(step)
        parts = [mixed(folders).batch(step, rank=rank, size=size) for rank in range(size)]
        assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
        assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
        assert torch.equal(torch.cat([part.document_ids for part in parts]), whole.document_ids)
        assert sum((part.sample_ids for part in parts), ()) == whole.sample_ids


def test_rows_do_not_depend_on_how_many_make_a_step(folders: list[str]) -> None:
    small, large = mixed(folders, rows_per_step=4), mixed(folders, rows_per_step=12)
    joined = torch.cat([small.batch(step).tokens for step in range(6)])
    assert torch.equal(joined, torch.cat([large.batch(step).tokens for step in range(2)]))


def test_seed_and_stage_change_the_order_only(folders: list[str]) -> None:
    path = folders[0]
    rows = stage({path: 1.0})._datasets[0].rows_per_epoch
    orders = [
        stage({path: 1.0}, rows_per_step=rows, **changes).sample_ids(0)
        for changes in ({}, {"seed": 2}, {"stage": "later"})
    ]
    assert len(set(orders)) == 3
    assert len({tuple(sorted(order)) for order in orders}) == 1


def test_shares_follow_the_weights_across_epochs(folders: list[str]) -> None:
    data = mixed(folders)
    names = [name for step in range(40) for name in data.sample_ids(step)]
    counts = Counter(name.split(":")[0] for name in names)
    found = [counts[dataset.manifest.fingerprint[:8]] for dataset in data._datasets]
    for count, wanted in zip(found, [240, 144, 96], strict=True):
        assert abs(count - wanted) <= 1
    assert len(set(names)) == len(names)
    assert any(int(name.split(":")[1]) > 0 for name in names)


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("start", [0, 5, 23])
def test_a_stream_resumes_at_any_step(folders: list[str], start: int, prefetch: int) -> None:
    data = mixed(folders)
    stream = mixed(folders).stream(start, rank=1, size=3, prefetch=prefetch)
    for step in range(start, start + 6):
        assert same(next(stream), data.batch(step, rank=1, size=3))
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_an_error_in_the_thread_reaches_the_reader(
    folders: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = mixed(folders)
    batch = StageData.batch

    def failing(self: StageData, step: int, **ranks: int) -> Batch:
        if step == 2:
            raise OSError("disk gone")
        return batch(self, step, **ranks)

    monkeypatch.setattr(StageData, "batch", failing)
    stream = data.stream(0, prefetch=2)
    next(stream)
    next(stream)
    with pytest.raises(OSError, match="disk gone"):
        next(stream)


def test_the_fingerprint_covers_what_decides_the_order(folders: list[str], tmp_path: Path) -> None:
    one = dict.fromkeys(folders[:2], 1.0)
    prints = [
        stage(one).fingerprint,
        stage(one, seed=2).fingerprint,
        stage(one, stage="later").fingerprint,
        stage(one, sequence_length=8).fingerprint,
        stage(one, rows_per_step=6).fingerprint,
        stage(one, split="heldout").fingerprint,
        stage({folders[0]: 1.0, folders[1]: 2.0}).fingerprint,
        stage({folders[0]: 1.0}).fingerprint,
        stage({folders[1]: 1.0, folders[0]: 1.0}).fingerprint,
    ]
    assert len(set(prints)) == len(prints)
    moved = tmp_path / "moved"
    write_folder(moved, random_documents(40, seed=0), heldout=random_documents(20, seed=9))
    assert stage({str(moved): 1.0}).fingerprint == prints[7]


def test_facts_about_the_tokens(folders: list[str]) -> None:
    data = mixed(folders)
    assert (data.vocab_size, data.eos_token_id, data.tokenizer_sha256) == (100, 0, "t" * 64)
    data.check_model(100)
    data.check_model(128)
    with pytest.raises(ValueError, match=r"model\.vocab_size \(99\) must be at least .*got 100"):
        data.check_model(99)


def test_different_tokenizers_in_a_mixture_are_refused(folders: list[str], tmp_path: Path) -> None:
    other = write_folder(tmp_path / "o", random_documents(40), tokenizer_sha256="u" * 64)
    with pytest.raises(ValueError, match=r"data\.mixture: .* must have the tokenizer of .*got ttt"):
        stage({folders[0]: 1.0, str(other): 1.0})


@pytest.mark.parametrize("changes", [{"sequence_length": 0}, {"rows_per_step": 0}], ids=str)
def test_impossible_sizes_are_refused(folders: list[str], changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(changes))} \(0\) must be at least 1"):
        mixed(folders, **changes)


@pytest.mark.parametrize(("rank", "size"), [(0, 5), (0, 24), (2, 2), (-1, 2)])
def test_ranks_that_do_not_divide_the_rows_are_refused(
    folders: list[str], rank: int, size: int
) -> None:
    with pytest.raises(ValueError, match=r"rows_per_step \(12\) must be a multiple"):
        mixed(folders).batch(0, rank=rank, size=size)


def test_heldout_rows_are_fixed_and_of_the_heldout_part(folders: list[str]) -> None:
    first = heldout_rows(folders[0], sequence_length=16, rows=6)
    assert first.tokens.shape == (6, 16)
    assert same(first, heldout_rows(Path(folders[0]), sequence_length=16, rows=6))
    fewer = heldout_rows(folders[0], sequence_length=16, rows=3)
    assert torch.equal(fewer.tokens, first.tokens[:3])
    stream = [token for document in random_documents(20, seed=9) for token in document]
    known = {tuple(stream[i : i + 3]) for i in range(len(stream))}
    inside = first.tokens[:, :3][(first.document_ids[:, :3] == 0).all(dim=1)]
    assert len(inside)
    assert all(tuple(row.tolist()) in known for row in inside)


def test_too_few_heldout_rows_warn(folders: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        batch = heldout_rows(folders[0], sequence_length=16, rows=500)
    total = sum(len(document) for document in random_documents(20, seed=9))
    assert len(batch.tokens) == total // 16 == len(set(batch.sample_ids))
    assert f"holds {total // 16} held-out rows of 16 tokens" in caplog.text
    with pytest.raises(ValueError, match=r"rows \(0\) must be at least 1"):
        heldout_rows(folders[0], sequence_length=16, rows=0)
