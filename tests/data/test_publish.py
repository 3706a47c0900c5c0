from __future__ import annotations

import os
from pathlib import Path

import pytest

from data.publish import exclusive, staged


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with exclusive(out), staged(out) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "a").write_text("x")
        assert names(out) == []
    assert names(out) == ["inner"]
    assert names(tmp_path) == [".out.lock", "out"]


def test_after_an_error_nothing_is_left(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def interrupted() -> None:
        with exclusive(out), staged(out) as partial:
            (partial / "a").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == [".out.lock"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half").write_text("x")
    with staged(tmp_path / "out") as partial:
        (partial / "whole").write_text("x")
    assert names(tmp_path / "out") == ["whole"]


def test_other_files_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with (
        pytest.raises(ValueError, match=r"out \(.*\) must be new or empty"),
        staged(tmp_path / "out"),
    ):
        pass
    assert names(tmp_path / "out") == ["thesis.tex"]


def test_everything_is_synced_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def record(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def note(self: Path, target: Path) -> Path:
        events.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(Path, "rename", note)
    with staged(tmp_path / "out") as partial:
        (partial / "a").write_text("x")
        (partial / "b").mkdir()
        (partial / "b" / "c").write_text("x")
    assert set(events[:4]) == {"a", "b", "c", ".out.partial"}
    assert events[4:] == ["rename", tmp_path.name]
