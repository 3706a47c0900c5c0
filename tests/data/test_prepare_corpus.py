from __future__ import annotations

import json
import logging
import random
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

import data.prepare_corpus as pipeline
from data.config import CorpusConfig
from data.documents import Document, OnError
from data.indexed import TokenShard
from data.prepare_corpus import BATCH_BYTES, batches, ensure_prepared, prepare
from data.prepared import MANIFEST_FILE, check_files, open_tokenizer, read_manifest
from data.tokenizer import Tokenizer, load_tokenizer
from data.tokenizer_training import train_sentencepiece

VOCAB = 300


def texts(count: int, *, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    words = ["def", "return", "self", "value", "import", "\n", "\n    ", "\t", "(x)", "é", "\u2581"]
    return [
        f"text {i}\n" + " ".join(rng.choices(words, k=rng.randint(1, 60))) for i in range(count)
    ]


def folder_of(root: Path, contents: Sequence[str]) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for index, content in enumerate(contents):
        (root / f"{index:04d}.py").write_text(content)
    return root


def decoded(folder: Path, split: str) -> list[str]:
    """Every document of a split as text, its end token checked and removed."""
    tokenizer = open_tokenizer(folder)
    shard = TokenShard(folder / split)
    ends = np.cumsum(shard.lengths)
    found = []
    for start, end in zip(ends - shard.lengths, ends, strict=True):
        tokens = shard.tokens[start:end].tolist()
        assert tokens[-1] == tokenizer.eos_token_id
        found.append(tokenizer.decode(tokens[:-1]))
    return found


def write_source(kind: str, root: Path, contents: list[str]) -> Path:
    root.mkdir(parents=True)
    if kind == "folder":
        return folder_of(root / "src", contents)
    if kind == "jsonl":
        path = root / "a.jsonl"
        path.write_text("".join(json.dumps({"text": content}) + "\n" for content in contents))
        return path
    table = datasets.Dataset.from_dict({"text": contents})
    if kind == "parquet":
        table.to_parquet(root / "a.parquet")
        return root / "a.parquet"
    table.save_to_disk(root / "saved")
    return root / "saved"


@pytest.mark.parametrize("kind", ["folder", "jsonl", "parquet", "saved"])
def test_every_kind_of_source_comes_back_exactly(tmp_path: Path, kind: str) -> None:
    contents = texts(60)
    source = write_source(kind, tmp_path / "source", contents)
    out = tmp_path / "out"
    manifest = prepare(str(source), out, vocab_size=VOCAB, heldout_fraction=0.2)
    train, heldout = decoded(out, "train"), decoded(out, "heldout")
    assert sorted(train + heldout) == sorted(contents)
    assert len(heldout) > 3
    assert manifest == read_manifest(out)
    check_files(out, manifest, hashes=True)
    for split, members in (("train", train), ("heldout", heldout)):
        shard = TokenShard(out / split)
        assert manifest.counts[split] == {
            "documents": len(members),
            "tokens": shard.num_tokens,
            "text_bytes": sum(len(text.encode()) for text in members),
        }
    assert manifest.vocab_size == VOCAB
    assert manifest.eos_token_id == open_tokenizer(out).eos_token_id
    assert manifest.token_dtype == "uint16"
    assert manifest.source == str(source)
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_rows_are_held_out_alike_in_every_kind(tmp_path: Path) -> None:
    contents = texts(60)
    members = []
    for kind in ("jsonl", "parquet", "saved"):
        source = write_source(kind, tmp_path / kind, contents)
        prepare(str(source), tmp_path / f"{kind}-out", vocab_size=VOCAB, heldout_fraction=0.2)
        members.append(sorted(decoded(tmp_path / f"{kind}-out", "heldout")))
    assert members[0] == members[1] == members[2]


def test_preparing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    source = str(folder_of(tmp_path / "src", texts(40)))
    one = prepare(source, tmp_path / "a", vocab_size=VOCAB, num_threads=1)
    two = prepare(source, tmp_path / "b", vocab_size=VOCAB, num_threads=2)
    assert one == two
    changed = folder_of(tmp_path / "src2", [*texts(39), "different"])
    three = prepare(str(changed), tmp_path / "c", vocab_size=VOCAB)
    assert three.fingerprint != one.fingerprint
    assert three.text_sha256 != one.text_sha256


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("given")
    train_sentencepiece(texts(50), folder, vocab_size=310)
    return folder


@pytest.mark.parametrize("form", ["folder", "file"])
def test_a_given_tokenizer_is_used_and_copied(tmp_path: Path, given: Path, form: str) -> None:
    source = folder_of(tmp_path / "src", texts(10))
    path = given if form == "folder" else given / "tokenizer.model"
    manifest = prepare(str(source), tmp_path / "out", tokenizer=path)
    assert manifest.vocab_size == 310
    assert manifest.tokenizer_sha256 == load_tokenizer(given).sha256
    assert open_tokenizer(tmp_path / "out").sha256 == manifest.tokenizer_sha256
    with pytest.raises(ValueError, match=r"vocab_size \(400\) must be the given .* got 310"):
        prepare(str(source), tmp_path / "other", tokenizer=path, vocab_size=400)


def test_a_chosen_end_token_stays_chosen(tmp_path: Path, given: Path) -> None:
    source = str(folder_of(tmp_path / "src", texts(30)))
    for name, tokenizer in (("a", given), ("b", None)):
        size = None if tokenizer else VOCAB
        out = tmp_path / name
        manifest = prepare(source, out, tokenizer=tokenizer, vocab_size=size, eos_token="<s>")
        assert manifest.eos_token_id == open_tokenizer(out).eos_token_id == 1
        assert decoded(out, "train")


def test_the_tokenizer_is_trained_without_heldout_text(tmp_path: Path) -> None:
    contents = texts(30)
    source = str(folder_of(tmp_path / "src", contents))
    prepare(source, tmp_path / "a", vocab_size=VOCAB, heldout_fraction=0.3)
    heldout = set(decoded(tmp_path / "a", "heldout"))
    for index, content in enumerate(contents):
        if content in heldout:
            (tmp_path / "src" / f"{index:04d}.py").write_text("zzz qqq " * 50)
    prepare(source, tmp_path / "b", vocab_size=VOCAB, heldout_fraction=0.3)
    first, second = read_manifest(tmp_path / "a"), read_manifest(tmp_path / "b")
    assert first.tokenizer_sha256 == second.tokenizer_sha256
    assert first.fingerprint != second.fingerprint


def test_damaged_documents_are_skipped_and_named_or_fatal(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "src", texts(12))
    (source / "bad.py").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"bad\.py must be readable: not UTF-8"):
        prepare(str(source), tmp_path / "out", vocab_size=VOCAB, on_error="fatal")
    assert not (tmp_path / "out").exists()
    manifest = prepare(str(source), tmp_path / "out", vocab_size=VOCAB)
    assert manifest.skipped_count == 1
    assert manifest.skipped[0].startswith("bad.py: not UTF-8")
    assert sum(count["documents"] for count in manifest.counts.values()) == 12
    with pytest.raises(ValueError, match=r"on_error \(fatal\) must meet no damaged .*bad\.py"):
        prepare(str(source), tmp_path / "out", vocab_size=VOCAB, on_error=OnError.fatal)


@pytest.mark.parametrize("has_tokenizer", [False, True])
def test_an_empty_source_is_refused(tmp_path: Path, given: Path, has_tokenizer: bool) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "image.png").write_bytes(b"x")
    (tmp_path / "src" / "rows.jsonl").write_text('{"body": "x"}\n')
    tokenizer = given if has_tokenizer else None
    with pytest.raises(
        ValueError, match=r"source \(.*src\) must hold .*got 0, and 1 damaged; first: rows.jsonl:1"
    ):
        prepare(str(tmp_path / "src"), tmp_path / "out", tokenizer=tokenizer)
    assert not (tmp_path / "out").exists()


def test_one_document_cannot_be_both_parts(tmp_path: Path, given: Path) -> None:
    source, out = str(folder_of(tmp_path / "src", texts(1))), tmp_path / "out"
    for fraction, tokenizer in ((0.05, given), (0.99, given), (0.99, None)):
        with pytest.raises(
            ValueError, match=rf"heldout_fraction \({fraction}\) must leave .*got 1 in all"
        ):
            prepare(source, out, tokenizer=tokenizer, heldout_fraction=fraction)
        assert not out.exists()
    manifest = prepare(source, out, tokenizer=given, heldout_fraction=0.0)
    assert list(manifest.counts) == ["train"]


def test_a_source_that_is_not_there_leaves_no_trace(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"source \(.*nowhere\) must be an existing file or folder"
    ):
        prepare(str(tmp_path / "nowhere"), tmp_path / "made" / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_impossible_fractions_are_refused(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(ValueError, match=r"heldout_fraction .* must be in \[0, 1\)"):
        prepare(None, tmp_path / "out", heldout_fraction=fraction)


def test_the_same_arguments_reuse_and_others_are_refused(
    tmp_path: Path, given: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(folder_of(tmp_path / "src", texts(30)))
    out = tmp_path / "out"
    first = prepare(source, out, vocab_size=VOCAB)
    changes: dict[str, dict[str, Any]] = {
        "vocab_size": {"vocab_size": VOCAB + 1},
        "heldout_fraction": {"heldout_fraction": 0.1},
        "max_bytes": {"max_bytes": 5000},
        "text_key": {"text_key": "body"},
        "tokenizer": {"tokenizer": given, "vocab_size": None},
        "eos_token": {"eos_token": "<s>"},
    }
    for name, change in changes.items():
        with pytest.raises(ValueError, match=rf"{name} \(.*\) must be what .* was prepared with"):
            prepare(source, out, **{"vocab_size": VOCAB, **change})
    with pytest.raises(ValueError, match=r"source \(None\) must be what"):
        prepare(None, out, vocab_size=VOCAB)
    monkeypatch.setattr(pipeline, "_build", None)
    assert prepare(source, out, vocab_size=VOCAB) == first
    monkeypatch.chdir(tmp_path)
    assert prepare("src", out, vocab_size=VOCAB) == first


def test_a_damaged_result_is_not_reused(tmp_path: Path) -> None:
    source = str(folder_of(tmp_path / "src", texts(30)))
    prepare(source, tmp_path / "out", vocab_size=VOCAB)
    tokens = tmp_path / "out" / "train.bin"
    tokens.write_bytes(tokens.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"train\.bin .*truncated"):
        prepare(source, tmp_path / "out", vocab_size=VOCAB)


def test_the_default_corpus_is_prepared_on_first_use(tmp_path: Path) -> None:
    config = CorpusConfig(out=str(tmp_path / "std"), max_bytes=300_000, vocab_size=400)
    assert ensure_prepared(config) == tmp_path / "std"
    manifest = read_manifest(tmp_path / "std")
    size = sum(count["text_bytes"] for count in manifest.counts.values())
    assert 290_000 < size <= 300_000
    assert manifest.source.startswith("standard library of Python 3.")
    before = (tmp_path / "std" / MANIFEST_FILE).stat().st_mtime_ns
    ensure_prepared(config)
    assert (tmp_path / "std" / MANIFEST_FILE).stat().st_mtime_ns == before


def test_batches_hold_each_document_once_and_little_more_than_their_size() -> None:
    documents = [Document(str(index), "x" * (BATCH_BYTES // 3)) for index in range(10)]
    found = list(batches(documents))
    assert [document for batch in found for document in batch] == documents
    assert [len(batch) for batch in found] == [4, 4, 2]


def test_throughput_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.progress.PROGRESS_SECONDS", 0.0)
    source = folder_of(tmp_path / "src", texts(20))
    with caplog.at_level(logging.INFO):
        prepare(str(source), tmp_path / "out", vocab_size=VOCAB)
    lines = [line for line in caplog.messages if "MB/s" in line]
    assert lines[0].startswith("encoding 20 documents")
    assert lines[-1].startswith("encoded 20 documents")
    assert all("tokens/s" in line for line in lines)


class FewTokens(Tokenizer):
    """Two tokens a text, so that only the pipeline itself can hold memory."""

    vocab_size, eos_token_id, eos_token = 50, 0, "end"

    def encode(self, text: str) -> list[int]:
        return [1, 2]

    def encode_batch(self, texts: Sequence[str], *, num_threads: int = 1) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: object) -> str:
        return ""


@pytest.mark.parametrize("kind", ["jsonl", "text"])
def test_memory_does_not_grow_with_the_source(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").write_bytes(b"x")
    monkeypatch.setattr(pipeline, "_tokenizer", lambda *_: FewTokens(tmp_path / "model"))
    line = "x" * 2000 + "\n"
    peaks = []
    for megabytes in (6, 60):
        source = tmp_path / f"{megabytes}.{'jsonl' if kind == 'jsonl' else 'txt'}"
        with source.open("w") as stream:
            for index in range(megabytes * 500):
                text = f"{index} {line}"
                stream.write(json.dumps({"text": text}) + "\n" if kind == "jsonl" else text)
        tracemalloc.start()
        manifest = prepare(str(source), tmp_path / f"out{megabytes}", document_bytes=1 << 18)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        written = sum(count["text_bytes"] for count in manifest.counts.values())
        assert written > megabytes * 1e6
    assert peaks[0] < 16 * BATCH_BYTES
    assert peaks[1] < peaks[0] + 3 * BATCH_BYTES
