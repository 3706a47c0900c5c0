from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.conversion.huggingface import (
    INDEX,
    SINGLE,
    SafetensorsFolder,
    TensorEntry,
    copy_tokenizer,
    write_sharded,
)


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "odd": torch.randn(3, generator=generator).to(torch.bfloat16),
        "half": torch.randn(5, 4, generator=generator).to(torch.float16),
        "single": torch.randn(4, 7, generator=generator),
        "double": torch.randn(2, 3, 5, generator=generator, dtype=torch.float64),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
    }


def entries(values: dict[str, torch.Tensor]) -> list[TensorEntry]:
    return [
        TensorEntry(name, tuple(value.shape), value.dtype, lambda value=value: value)
        for name, value in values.items()
    ]


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    flat = [t.reshape(-1).contiguous().view(torch.uint8) for t in (left, right)]
    return torch.equal(*flat)


def make_folder(path: Path, values: dict[str, torch.Tensor], shard_bytes: int = 10**9) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    write_sharded(path, entries(values), max_shard_bytes=shard_bytes)
    return path


@pytest.mark.parametrize("shard_bytes", [1, 64, 150, 10**9])
def test_written_folder_is_read_back_bit_by_bit(tmp_path: Path, shard_bytes: int) -> None:
    folder = make_folder(tmp_path / "a", tensors(), shard_bytes)
    source = SafetensorsFolder(folder)
    assert set(source.names()) == set(tensors())
    for name, value in tensors().items():
        assert source.shape(name) == tuple(value.shape)
        assert source.dtype(name) is value.dtype
        assert same_bits(source.load(name), value), name


def test_every_tensor_is_aligned_to_its_dtype(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a", tensors())
    data = (folder / SINGLE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    for name, value in tensors().items():
        assert header[name]["data_offsets"][0] % value.itemsize == 0, name


def test_shards_stay_below_the_limit_and_the_library_reads_them(tmp_path: Path) -> None:
    values = {f"t{i}": torch.full((16,), float(i)) for i in range(7)}
    folder = make_folder(tmp_path / "a", values, shard_bytes=2 * 64)
    index = json.loads((folder / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    assert index["metadata"]["total_size"] == 7 * 64
    read = {name: value for file in files for name, value in load_file(folder / file).items()}
    assert all(torch.equal(read[name], values[name]) for name in values)
    assert len(read) == 7


def test_truncated_shard_is_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a", {"x": torch.ones(100)})
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[:-10])
    with pytest.raises(ValueError, match=rf"shard .*{SINGLE} \({len(data) - 10} bytes\) is trunc"):
        SafetensorsFolder(folder)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a", {"x": torch.ones(9), "y": torch.ones(9)}, shard_bytes=40)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors is missing"):
        SafetensorsFolder(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"z": "model-00001-of-00002.safetensors"}, "z is in the index but in no shard"),
     ({"x": None}, "x is in model-00001-of-00002.safetensors only")],
)  # fmt: skip
def test_index_must_agree_with_shards(
    tmp_path: Path, change: dict[str, str | None], message: str
) -> None:
    folder = make_folder(tmp_path / "a", {"w": torch.ones(9), "x": torch.ones(9)}, shard_bytes=80)
    save_file({"y": torch.ones(9)}, folder / "model-00002-of-00002.safetensors")
    (folder / SINGLE).rename(folder / "model-00001-of-00002.safetensors")
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    weight_map: dict[str, str | None] = {"w": first, "x": first, "y": second, **change}
    listed = {name: file for name, file in weight_map.items() if file is not None}
    (folder / INDEX).write_text(json.dumps({"weight_map": listed}))
    with pytest.raises(ValueError, match=message):
        SafetensorsFolder(folder)


def test_index_may_not_leave_its_folder(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a", {"x": torch.ones(3)})
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": "../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match="plain file name"):
        SafetensorsFolder(folder)


def test_folder_without_weights_or_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must hold config.json: there is no such file"):
        SafetensorsFolder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="must hold model.safetensors or .*: neither is there"):
        SafetensorsFolder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json must be JSON"):
        SafetensorsFolder(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must be a JSON object: got list"):
        SafetensorsFolder(tmp_path)


def test_quantised_tensor_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"x": torch.ones(3, dtype=torch.int8)}, tmp_path / SINGLE)
    with pytest.raises(ValueError, match=r"tensor x \(I8\) must be one of .*not quantised"):
        SafetensorsFolder(tmp_path).dtype("x")


def test_writer_refuses_another_shape_than_planned(tmp_path: Path) -> None:
    entry = TensorEntry("x", (4,), torch.float32, lambda: torch.ones(5))
    with pytest.raises(ValueError, match=r"tensor x \(5,\) must have the planned shape"):
        write_sharded(tmp_path, [entry], max_shard_bytes=100)


def test_writer_casts_to_the_planned_dtype(tmp_path: Path) -> None:
    entry = TensorEntry("x", (3,), torch.bfloat16, lambda: torch.tensor([1.0, 2.5, 1e-3]))
    write_sharded(tmp_path, [entry], max_shard_bytes=100)
    expected = torch.tensor([1.0, 2.5, 1e-3]).to(torch.bfloat16)
    assert same_bits(load_file(tmp_path / SINGLE)["x"], expected)


def test_only_tokenizer_files_are_copied(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b" / "tokenizer"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "secret.txt", "config.json"):
        (source / name).write_text(name)
    assert copy_tokenizer(source, target) == ("tokenizer.json", "tokenizer_config.json")
    assert sorted(p.name for p in target.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert copy_tokenizer(tmp_path / "b", tmp_path / "c") == ()
    assert not (tmp_path / "c").exists()
