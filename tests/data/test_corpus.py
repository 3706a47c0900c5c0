from __future__ import annotations

import json
import logging
import os
import random
import sysconfig
from pathlib import Path

import datasets
import pytest

from data.corpus import Corpus, unit_hash
from data.documents import Damage, Document, OnError


def read(corpus: Corpus) -> list[Document]:
    return list(corpus.documents(Damage(quiet=True)))


def tree(root: Path, names: list[str]) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"content of {name}\n")
    return root


def test_a_folder_is_read_in_sorted_order_by_ending(tmp_path: Path) -> None:
    names = ["b/x.py", "b/a.txt", "a.md", "z.py", "b.c"]
    tree(tmp_path, [*names, "image.png", ".hidden.py", ".git/c.py", "__pycache__/d.py"])
    (tmp_path / "empty.py").touch()
    assert [d.name for d in read(Corpus(root=tmp_path))] == [
        "a.md", "b.c", "z.py", "b/a.txt", "b/x.py",
    ]  # fmt: skip
    assert "empty.py" not in {file.name for file in Corpus(root=tmp_path).files()}
    assert Corpus(root=tmp_path).size_bytes() == sum(len(f"content of {n}\n") for n in names)


def test_what_is_left_out_by_its_ending_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree(tmp_path, ["a.txt", "b.json", "c.json", "d.csv", "Makefile"])
    with caplog.at_level(logging.INFO):
        assert [d.name for d in read(Corpus(root=tmp_path))] == ["a.txt"]
    assert "left out 4 files by their ending: .json 2" in caplog.text


def test_a_folder_that_cannot_be_read_is_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree(tmp_path, ["a.txt", "closed/b.txt"])
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    damage = Damage(quiet=True)
    assert [d.name for d in Corpus(root=tmp_path).documents(damage)] == ["a.txt"]
    assert damage.named == ["closed: Permission denied"]
    with pytest.raises(ValueError, match="closed must be readable: Permission denied"):
        list(Corpus(root=tmp_path).documents(Damage(OnError.fatal)))


def test_rows_and_plain_files_may_lie_in_one_folder(tmp_path: Path) -> None:
    tree(tmp_path, ["a.txt"])
    (tmp_path / "b.jsonl").write_text('{"text": "row"}\n')
    datasets.Dataset.from_dict({"text": ["p"]}).to_parquet(tmp_path / "c.parquet")
    names = [d.name for d in read(Corpus(root=tmp_path))]
    assert names == ["a.txt", "b.jsonl:1", "c.parquet:1"]


def test_a_saved_dataset_is_recognised(tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict({"text": ["x", "y"]})
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=table).save_to_disk(tmp_path / "many")
    for name in ("one", "many"):
        corpus = Corpus(root=tmp_path / name)
        assert corpus.is_saved_dataset
        assert [d.text for d in read(corpus)] == ["x", "y"]
        assert corpus.size_bytes() > 0


def test_the_default_is_the_standard_library_and_nothing_installed() -> None:
    files = list(Corpus(root=None).files())
    names = [file.name for file in files]
    assert "json/decoder.py" in names
    assert files[0].path.is_relative_to(sysconfig.get_path("stdlib"))
    assert all(name.endswith(".py") for name in names)
    left_out = {"site-packages", "dist-packages", "__pycache__"}
    assert not left_out & {part for name in names for part in name.split("/")}
    assert sum(file.size for file in files) > 5_000_000


def test_max_bytes_spreads_over_the_source_and_grows_by_adding(tmp_path: Path) -> None:
    names = [f"{folder}/{index}.py" for folder in "abcdefgh" for index in range(20)]
    tree(tmp_path, names)
    size = (tmp_path / names[0]).stat().st_size
    small = {f.name for f in Corpus(root=tmp_path, max_bytes=40 * size).files()}
    large = {f.name for f in Corpus(root=tmp_path, max_bytes=80 * size).files()}
    assert 36 <= len(small) <= 40
    assert small < large
    assert {name[0] for name in small} == set("abcdefgh")
    chosen = [f.name for f in Corpus(root=tmp_path, max_bytes=40 * size).files()]
    assert chosen == [name for name in sorted(names) if name in small]


def test_the_choice_does_not_depend_on_the_order_of_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree(tmp_path, [f"{folder}/{index}.py" for folder in "abc" for index in range(9)])
    corpus = Corpus(root=tmp_path, max_bytes=200)
    before = [d.name for d in read(corpus)]
    walk = os.walk

    def shuffled(root: Path, **options: object):  # type: ignore[no-untyped-def]
        for folder, folders, names in walk(root):
            random.Random(1).shuffle(folders)
            random.Random(2).shuffle(names)
            yield folder, folders, names

    monkeypatch.setattr(os, "walk", shuffled)
    assert [d.name for d in read(corpus)] == before


def test_max_bytes_of_rows_takes_the_first(tmp_path: Path) -> None:
    rows = "".join(json.dumps({"text": "é" * 10}) + "\n" for _ in range(10))
    (tmp_path / "a.jsonl").write_text(rows)
    assert len(read(Corpus(root=tmp_path / "a.jsonl", max_bytes=65))) == 3
    assert len(read(Corpus(root=tmp_path, max_bytes=60))) == 3
    assert len(read(Corpus(root=tmp_path, max_bytes=1))) == 1


def test_one_text_file_becomes_several_documents(tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(30_000))
    (tmp_path / "book.txt").write_text(text)
    found = read(Corpus(root=tmp_path / "book.txt"))
    assert "".join(d.text for d in found) == text
    assert 30 <= len(found) <= 36
    assert found[0].name == "book.txt#0"
    first = read(Corpus(root=tmp_path / "book.txt", max_bytes=50_000))
    assert text.startswith("".join(d.text for d in first))
    assert 45_000 < sum(len(d.text) for d in first) <= 50_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"root": Path("/no/such/place")}, r"source \(/no/such/place\) must be an existing"),
        ({"root": None, "max_bytes": 0}, r"max_bytes \(0\) must be at least 1"),
        ({"root": None, "document_bytes": 3}, r"document_bytes \(3\) must be at least 16"),
    ],
)
def test_impossible_values_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Corpus(**options)  # type: ignore[arg-type]


def test_max_bytes_below_every_file_is_refused(tmp_path: Path) -> None:
    tree(tmp_path, ["a.py"])
    with pytest.raises(ValueError, match=r"max_bytes \(3\) must be at least the smallest.*got 16"):
        list(Corpus(root=tmp_path, max_bytes=3).files())


def test_hashes_for_different_purposes_are_unrelated() -> None:
    keys = [f"file{i}" for i in range(2000)]
    chosen = [key for key in keys if unit_hash("choice", key) < 0.2]
    held = sum(unit_hash("heldout", key) < 0.1 for key in chosen)
    assert 0.05 < held / len(chosen) < 0.16
    assert unit_hash("a", "b") == unit_hash("a", "b") != unit_hash("a", "c")
