"""Checkpoints of one process: bitwise round trips, atomicity, damage, disk full, pruning."""

from __future__ import annotations

import json
import logging
import resource
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

import parallel.checkpoint_files
from parallel.checkpoint import (
    Box,
    CheckpointError,
    DamagedCheckpointError,
    LazyTensor,
    load,
    newest_complete,
    prune,
    read_manifest,
    read_tensors,
    save,
    save_streamed,
    step_directory,
    tensor_dtypes,
    tensor_shapes,
    verify,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Let writes fail beyond a file size, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def example(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"model/{index}.{dtype}".replace("torch.", ""): torch.randn(
            5 + index, 3, generator=generator
        ).to(dtype)
        for index, dtype in enumerate(DTYPES)
    }


def boxes(tensors: dict[str, Tensor]) -> dict[str, Box]:
    return {name: Box.whole(tensor) for name, tensor in tensors.items()}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip_is_bitwise_and_lists_its_files(tmp_path: Path) -> None:
    tensors = example()
    save(tmp_path / "c", boxes(tensors), {"step": 3, "stage": "a"})
    manifest = read_manifest(tmp_path / "c")
    assert (manifest["kind"], manifest["format_version"]) == ("synfire", 1)
    assert (manifest["step"], manifest["stage"]) == (3, "a")
    assert set(manifest["files"]) == set(names_in(tmp_path / "c")) - {"manifest.json"}
    assert tensor_shapes(tmp_path / "c") == {n: tuple(t.shape) for n, t in tensors.items()}
    assert tensor_dtypes(tmp_path / "c") == {n: t.dtype for n, t in tensors.items()}
    found = dict(read_tensors(tmp_path / "c"))
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert names_in(tmp_path) == ["c"]


def test_saved_as_quarters_loads_as_rows_columns_and_whole(tmp_path: Path) -> None:
    whole = torch.arange(35.0).view(7, 5)
    # One process stands for four: each quarter is its own key, so only loading is tested here.
    save(tmp_path / "c", {"w": Box.whole(whole)}, {})
    for offsets, shape in [((2, 0), (3, 5)), ((0, 1), (7, 2)), ((6, 4), (1, 1)), ((7, 0), (0, 5))]:
        box = Box(torch.full(shape, torch.nan), offsets, (7, 5))
        load(tmp_path / "c", {"w": box})
        assert torch.equal(box.local, whole[box.slices])


def test_dtypes_are_converted_on_load(tmp_path: Path) -> None:
    tensor = torch.randn(4).to(torch.bfloat16)
    save(tmp_path / "c", {"w": Box.whole(tensor)}, {})
    wide = torch.empty(4, dtype=torch.float64)
    load(tmp_path / "c", {"w": Box.whole(wide)})
    assert torch.equal(wide, tensor.double())


def test_a_part_of_a_larger_tensor_is_saved_alone(tmp_path: Path) -> None:
    storage = torch.randn(100, 100)
    parts = {"rows": storage[:2], "columns": storage[:2, ::2]}
    save(tmp_path / "c", boxes(parts), {})
    for name, found in read_tensors(tmp_path / "c"):
        assert torch.equal(found, parts[name])
    assert (tmp_path / "c" / "__0_0.distcp").stat().st_size < 6000


def test_other_files_are_hashed_too(tmp_path: Path) -> None:
    def add(folder: Path) -> None:
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "tokenizer.json").write_text("{}")

    save(tmp_path / "c", boxes(example()), {}, add_files=add)
    assert "tokenizer/tokenizer.json" in read_manifest(tmp_path / "c")["files"]
    (tmp_path / "c" / "tokenizer" / "tokenizer.json").write_text("[]")
    with pytest.raises(DamagedCheckpointError, match=r"tokenizer\.json has other contents"):
        verify(tmp_path / "c")


def test_streamed_tensors_live_one_at_a_time(tmp_path: Path) -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def make(value: float) -> Tensor:
        nonlocal most
        tensor = torch.full((50, 4), value)
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    lazy = [
        LazyTensor(f"w{i}", (50, 4), torch.float32, lambda i=i: make(float(i))) for i in range(6)
    ]
    save_streamed(tmp_path / "c", lazy, {})
    assert most == 1
    assert all(bool((t == float(name[1:])).all()) for name, t in read_tensors(tmp_path / "c"))


def test_large_checkpoints_are_cut_into_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel.checkpoint_files, "MAX_FILE_BYTES", 500)
    tensors = {f"w{i}": torch.randn(10, 5) for i in range(6)}
    save(tmp_path / "c", boxes(tensors), {})
    assert [n for n in names_in(tmp_path / "c") if n.endswith(".distcp")] == [
        "__0_0.distcp", "__0_1.distcp", "__0_2.distcp",
    ]  # fmt: skip
    assert all(torch.equal(t, tensors[name]) for name, t in read_tensors(tmp_path / "c"))


def test_named_tensors_and_unknown_names(tmp_path: Path) -> None:
    save(tmp_path / "c", boxes(example()), {})
    name = next(iter(example()))
    assert [n for n, _ in read_tensors(tmp_path / "c", [name])] == [name]
    with pytest.raises(ValueError, match="must hold model/none"):
        list(read_tensors(tmp_path / "c", ["model/none"]))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"model/x": Box.whole(torch.zeros(2))}, r"must hold model/x.*\(1 of 1 are missing\)"),
        ({"w": Box.whole(torch.zeros(2, 2))}, r"w \(3, 2\) must have shape \(2, 2\)"),
    ],
    ids=["name", "shape"],
)
def test_another_models_tensors(tmp_path: Path, request_: dict[str, Box], message: str) -> None:
    save(tmp_path / "c", {"w": Box.whole(torch.ones(3, 2))}, {})
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "c", request_)


def test_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"must be a folder with manifest\.json: got nothing"):
        load(tmp_path / "none", {})
    with pytest.raises(CheckpointError, match="got a folder without it"):
        read_manifest(tmp_path)
    assert newest_complete(tmp_path) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [({"kind": "other"}, "got other, format 1"), ({"format_version": 2}, "got synfire, format 2")],
)
def test_other_kinds_and_newer_formats(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    save(tmp_path / "c", boxes(example()), change)
    with pytest.raises(CheckpointError, match=message):
        read_manifest(tmp_path / "c")


def damage(folder: Path, how: str) -> None:
    data = folder / "__0_0.distcp"
    content = bytearray(data.read_bytes())
    if how == "truncated":
        data.write_bytes(content[:-10])
    elif how == "flipped":
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif how == "missing":
        data.unlink()
    else:
        text = (folder / "manifest.json").read_text()
        (folder / "manifest.json").write_text(text[: len(text) // 2])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", r"__0_0\.distcp has \d+ bytes instead of \d+"),
        ("flipped", r"__0_0\.distcp has other contents"),
        ("missing", r"__0_0\.distcp is missing"),
        ("manifest", r"damaged manifest\.json"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    tmp_path: Path, how: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (10, 20):
        save(step_directory(tmp_path, step), boxes(example(step)), {"step": step})
    damage(step_directory(tmp_path, 20), how)
    with pytest.raises(DamagedCheckpointError, match=message):
        load(step_directory(tmp_path, 20), {})
    with caplog.at_level(logging.WARNING):
        assert newest_complete(tmp_path) == step_directory(tmp_path, 10)
    assert "step_00000020" in caplog.text
    assert "passed over" in caplog.text
    damage(step_directory(tmp_path, 10), how)
    with pytest.raises(CheckpointError, match="all 2 are damaged"):
        newest_complete(tmp_path)


def test_a_half_written_one_is_never_chosen(tmp_path: Path) -> None:
    save(step_directory(tmp_path, 10), boxes(example()), {})
    half = tmp_path / "checkpoints" / ".step_00000020.partial"
    half.mkdir()
    for path in step_directory(tmp_path, 10).iterdir():
        (half / path.name).write_bytes(path.read_bytes())
    assert newest_complete(tmp_path) == step_directory(tmp_path, 10)
    save(step_directory(tmp_path, 20), boxes(example()), {})
    assert names_in(tmp_path / "checkpoints") == ["step_00000010", "step_00000020"]


def test_the_same_step_again_replaces(tmp_path: Path) -> None:
    for seed in (1, 2):
        save(step_directory(tmp_path, 10), boxes(example(seed)), {"seed": seed})
    assert read_manifest(step_directory(tmp_path, 10))["seed"] == 2
    assert names_in(tmp_path / "checkpoints") == ["step_00000010"]


def test_a_folder_that_is_no_checkpoint_is_not_replaced(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("all of it")
    with pytest.raises(CheckpointError, match="must be new, empty or an older checkpoint"):
        save(mine, boxes(example()), {})
    assert names_in(mine) == ["thesis.txt"]
    assert names_in(tmp_path) == ["mine"]


@pytest.mark.parametrize(
    ("limit", "rows", "count"),
    [
        (0, 500, 1), (700, 500, 1), (1500, 500, 1), (4000, 500, 1),
        (1_500_000, 60_000, 1), (500_000, 100, 300), (500_000, 13, 900), (500_000, 3000, 20),
    ],
)  # fmt: skip
def test_disk_full_leaves_older_checkpoints_and_nothing_else(
    tmp_path: Path, limit: int, rows: int, count: int
) -> None:
    """Small files fail when they are flushed, large ones in the middle of some write."""
    tensors = {f"w{index}": torch.randn(rows, 10) for index in range(count)}
    save(step_directory(tmp_path, 10), boxes(tensors), {})
    with largest_file(limit), pytest.raises(CheckpointError) as caught:
        save(step_directory(tmp_path, 20), boxes(tensors), {})
    assert "rank 0: OSError: [Errno 27] File too large" in str(caught.value)
    assert "Older checkpoints are unchanged. Free space" in str(caught.value)
    assert names_in(tmp_path / "checkpoints") == ["step_00000010"]
    assert newest_complete(tmp_path) == step_directory(tmp_path, 10)
    save(step_directory(tmp_path, 20), boxes(tensors), {})
    assert newest_complete(tmp_path) == step_directory(tmp_path, 20)


def test_disk_full_at_the_very_end(tmp_path: Path) -> None:
    """The data fits; a file that the caller adds does not."""

    def add(folder: Path) -> None:
        (folder / "big").write_bytes(b"x" * 50_000)

    with largest_file(30_000), pytest.raises(CheckpointError, match="File too large"):
        save(tmp_path / "c", boxes(example()), {}, add_files=add)
    assert names_in(tmp_path) == []


def test_a_value_that_is_no_json_fails_cleanly(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not JSON serializable"):
        save(tmp_path / "c", boxes(example()), {"bad": {1, 2}})
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(("keep", "left"), [(1, [40]), (2, [30, 40]), (9, [10, 20, 30, 40])])
def test_prune_keeps_the_newest(tmp_path: Path, keep: int, left: Sequence[int]) -> None:
    for step in (10, 20, 30, 40):
        step_directory(tmp_path, step).mkdir(parents=True)
    for leftover in (".step_00000050.partial", ".step_00000010.removed", ".step_00000001.replaced"):
        (tmp_path / "checkpoints" / leftover).mkdir()
    (tmp_path / "checkpoints" / "mine").mkdir()
    prune(tmp_path, keep_last=keep)
    assert names_in(tmp_path / "checkpoints") == ["mine", *(f"step_{s:08d}" for s in left)]


@pytest.mark.parametrize(
    ("keep", "every", "left"),
    [(1, 20, [20, 40, 50]), (2, 30, [30, 40, 50]), (1, 10, [10, 20, 30, 40, 50]), (1, 70, [50])],
)
def test_prune_keeps_milestones(tmp_path: Path, keep: int, every: int, left: Sequence[int]) -> None:
    for step in (10, 20, 30, 40, 50):
        step_directory(tmp_path, step).mkdir(parents=True)
    prune(tmp_path, keep_last=keep, keep_every_steps=every)
    assert names_in(tmp_path / "checkpoints") == [f"step_{step:08d}" for step in left]


def test_prune_refuses_to_keep_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"keep_last \(0\) must be at least 1"):
        prune(tmp_path, keep_last=0)


def test_a_manifest_is_plain_json(tmp_path: Path) -> None:
    save(tmp_path / "c", boxes(example()), {"nested": {"a": [1, None, "b"]}})
    content = json.loads((tmp_path / "c" / "manifest.json").read_text())
    assert content["nested"] == {"a": [1, None, "b"]}
