from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from data.documents import (
    NAMED_DAMAGE_LIMIT,
    Damage,
    Document,
    OnError,
    read_jsonl,
    read_parquet,
    read_saved_dataset,
    read_text,
)

AWKWARD = "\ufeffdef f(x):\r\n\tif x:\n\t    return '\u2581é漢🙂'\n\n\n   \t \x0c\n"


def text_of(path: Path, *, limit: int = 1 << 20, damage: Damage | None = None) -> list[Document]:
    damage = Damage(quiet=True) if damage is None else damage
    return list(read_text(path, "name", document_bytes=limit, damage=damage))


def test_plain_text_is_read_exactly(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(AWKWARD.encode())
    assert text_of(tmp_path / "a.py") == [Document("name", AWKWARD, split_key="name")]


@pytest.mark.parametrize("limit", [16, 17, 64, 1000])
def test_long_files_are_cut_at_line_ends_and_nothing_is_lost(tmp_path: Path, limit: int) -> None:
    lines = [f"{i} " + "é" * (i % 6) for i in range(300)]
    text = "\n".join(lines)
    (tmp_path / "a.txt").write_text(text)
    pieces = text_of(tmp_path / "a.txt", limit=limit)
    assert "".join(piece.text for piece in pieces) == text
    assert all(piece.text.endswith("\n") for piece in pieces[:-1])
    assert all(len(piece.text.encode()) <= limit for piece in pieces)
    assert [piece.name for piece in pieces] == [f"name#{i}" for i in range(len(pieces))]


@pytest.mark.parametrize("limit", [16, 17, 18, 19])
def test_a_line_above_the_limit_is_cut_between_characters(tmp_path: Path, limit: int) -> None:
    text = "🙂漢é" * 40
    (tmp_path / "a.txt").write_text(text)
    pieces = text_of(tmp_path / "a.txt", limit=limit)
    assert "".join(piece.text for piece in pieces) == text
    assert len(pieces) > 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"ok \xff\xfe", "not UTF-8"), (b"a\0b", "a NUL at byte 1")],
    ids=["undecodable", "nul"],
)
def test_a_corrupt_file_names_itself_and_is_skipped_or_fatal(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    (tmp_path / "bad.txt").write_bytes(content)
    damage = Damage(quiet=True)
    assert text_of(tmp_path / "bad.txt", damage=damage) == []
    assert damage.count == 1
    assert damage.named[0].startswith("name: ")
    assert reason in damage.named[0]
    with pytest.raises(ValueError, match=f"name must be readable: .*{reason}.*on_error=skip"):
        text_of(tmp_path / "bad.txt", damage=Damage(OnError.fatal))


def test_damage_late_in_a_large_file_says_where_and_what_was_kept(tmp_path: Path) -> None:
    lines = [f"line {number:03d}\n".encode() for number in range(40)]
    (tmp_path / "big.txt").write_bytes(b"".join(lines) + b"bad \xff\n" + b"".join(lines))
    damage = Damage(quiet=True)
    kept = text_of(tmp_path / "big.txt", limit=64, damage=damage)
    assert len(kept) > 2
    assert "".join(piece.text for piece in kept) == b"".join(lines).decode()[: 9 * 7 * len(kept)]
    assert damage.named == [
        f"name: not UTF-8 at byte {9 * 40 + 4} (invalid start byte); the {len(kept)} pieces before "
        "are kept, the rest is lost"
    ]


def test_an_unreadable_file_is_damage(tmp_path: Path) -> None:
    damage = Damage(quiet=True)
    assert text_of(tmp_path / "gone.txt", damage=damage) == []
    assert "No such file" in damage.named[0]


def test_damage_counts_all_and_names_the_first(caplog: pytest.LogCaptureFixture) -> None:
    damage = Damage()
    for index in range(NAMED_DAMAGE_LIMIT + 5):
        damage.report(f"file{index}", "bad")
    assert damage.count == NAMED_DAMAGE_LIMIT + 5
    assert damage.named[-1] == f"file{NAMED_DAMAGE_LIMIT - 1}: bad"
    assert "skipped file3: bad" in caplog.text


def test_a_bad_line_of_jsonl_costs_only_itself(tmp_path: Path) -> None:
    rows = [
        json.dumps({"body": "one\n"}).encode(),
        b'{"body": "half',
        b"",
        json.dumps({"text": "wrong key"}).encode(),
        json.dumps(["body"]).encode(),
        b'{"body": "\\ud800"}',
        b"[" * 100_000,
        json.dumps({"body": ""}).encode(),
        json.dumps({"body": "two", "meta": {"a": 1}}).encode(),
        json.dumps({"body": "three", "meta": "other type"}).encode(),
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows))
    damage = Damage(quiet=True)
    found = list(read_jsonl(tmp_path / "a.jsonl", "a.jsonl", text_key="body", damage=damage))
    assert [(d.name, d.text) for d in found] == [
        ("a.jsonl:1", "one\n"),
        ("a.jsonl:9", "two"),
        ("a.jsonl:10", "three"),
    ]
    assert [line.split(":")[1] for line in damage.named] == ["2", "4", "5", "6", "7"]
    assert "has text" in damage.named[1]
    assert "surrogate" in damage.named[3]
    with pytest.raises(ValueError, match=r"a\.jsonl:2 must be readable: not JSON"):
        list(
            read_jsonl(
                tmp_path / "a.jsonl", "a.jsonl", text_key="body", damage=Damage(OnError.fatal)
            )
        )


def test_parquet_streams_its_column(tmp_path: Path) -> None:
    texts = [f"text {i}\n" for i in range(50)]
    table = datasets.Dataset.from_dict({"text": texts, "n": list(range(50))})
    table.to_parquet(tmp_path / "a.parquet")
    damage = Damage(quiet=True)
    found = list(read_parquet(tmp_path / "a.parquet", "a", text_key="text", damage=damage))
    assert [d.text for d in found] == texts
    assert found[1].name == "a:2"
    assert list(read_parquet(tmp_path / "a.parquet", "a", text_key="no", damage=damage)) == []
    assert damage.count == 1
    assert "no" in damage.named[0]


def test_a_truncated_parquet_file_is_damage(tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict({"text": ["a", "b"]})
    table.to_parquet(tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    damage = Damage(quiet=True)
    assert list(read_parquet(tmp_path / "a.parquet", "a", text_key="text", damage=damage)) == []
    assert damage.count == 1


def saved(folder: Path, splits: list[str] | None = None) -> Path:
    table = datasets.Dataset.from_dict({"text": ["x\n", "y"], "n": [1, 2]})
    if splits is None:
        table.save_to_disk(folder)
    else:
        datasets.DatasetDict(dict.fromkeys(splits, table)).save_to_disk(folder)
    return folder


@pytest.mark.parametrize("splits", [None, ["train", "test"], ["only"]], ids=str)
def test_a_saved_dataset_streams(tmp_path: Path, splits: list[str] | None) -> None:
    folder = saved(tmp_path / "d", splits)
    found = list(read_saved_dataset(folder, "d", text_key="text", damage=Damage()))
    assert [d.text for d in found] == ["x\n", "y"]


def test_a_saved_dataset_without_the_column_or_the_split_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "d")
    with pytest.raises(ValueError, match=r"text_key \(body\) must be a column of .*: got text, n"):
        list(read_saved_dataset(folder, "d", text_key="body", damage=Damage()))
    folder = saved(tmp_path / "e", ["one", "two"])
    with pytest.raises(ValueError, match="must have a train split: got one, two"):
        list(read_saved_dataset(folder, "e", text_key="text", damage=Damage()))


def test_a_damaged_saved_dataset_is_damage(tmp_path: Path) -> None:
    folder = saved(tmp_path / "d")
    next(folder.glob("*.arrow")).write_bytes(b"no arrow")
    damage = Damage(quiet=True)
    assert list(read_saved_dataset(folder, "d", text_key="text", damage=damage)) == []
    assert damage.count == 1
