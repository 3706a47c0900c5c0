"""A model written as a Hugging Face folder: config.json, safetensors shards, tokenizer files.

In our own format the model's source files (`models.exported`) lie beside them. The tensors come
from anywhere, one at a time; what a format can express is in `target_config`.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from models.config import ModelConfig, SpikingConfig
from models.conversion.config_keys import NOTE_KEY, Format
from models.conversion.huggingface import (
    CONFIG,
    GENERATION_CONFIG,
    TensorEntry,
    copy_tokenizer,
    read_json,
    write_json,
    write_sharded,
)
from models.conversion.own_format import copy_source
from models.conversion.target_config import check_format, write_config
from models.conversion.weight_map import theirs
from models.layouts import parameter_layouts
from models.spiking.neurons import Spikes

MAX_SHARD_BYTES = 5_000_000_000


def export_folder(  # noqa: PLR0913 - everything a folder consists of
    entries: Sequence[TensorEntry],
    config: ModelConfig,
    out: Path,
    *,
    format: Format,
    tokenizer: Path | None = None,
    eos_token_id: int | None = None,
    spiking: SpikingConfig | None = None,
    spikes: Spikes | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a complete folder under a temporary name, then rename it to `out`.

    Args:
        entries: every parameter under our names, in any order.
        config: the model.
        out: a folder that does not exist yet, is empty, or is an older export.
        format: what to write; see `choose_format`.
        tokenizer: a folder whose tokenizer files are copied.
        eos_token_id: where generated text ends if the model itself names no token.
        spiking: noted in config.json where the format has no neurons.
        spikes: how the model spikes in our own format; None is not at all.
        max_shard_bytes: size at which a new safetensors file starts.

    Raises:
        ValueError: tensors that do not fit the model, a format that cannot hold it, `out` in use.
    """
    named = _rename(entries, config, format)
    ends = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    if config.eos_token_id is None:
        ends["eos_token_id"] = eos_token_id
    refuse_occupied(out)
    dtype = Counter(entry.dtype for entry in named).most_common(1)[0][0]
    keys = write_config(config, format, dtype=dtype, spiking=spiking, spikes=spikes)
    out.parent.mkdir(parents=True, exist_ok=True)
    _restore(out)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        write_sharded(partial, named, max_shard_bytes=max_shard_bytes)
        write_json(partial / CONFIG, keys)
        write_json(partial / GENERATION_CONFIG, ends)
        if format is Format.synfire:
            copy_source(partial)
        if tokenizer is not None:
            copy_tokenizer(tokenizer, partial)
        _replace(out, partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_occupied(out: Path) -> None:
    """Refuse to write over anything but an older export.

    Raises:
        ValueError: `out` exists, is not empty and was not written by `export_folder`.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / CONFIG).is_file() or NOTE_KEY not in read_json(out / CONFIG):
        raise ValueError(
            f"out ({out}) must be new, empty or an older export: it is neither. "
            "Name another folder."
        )


def _replace(out: Path, partial: Path) -> None:
    """Give the finished folder its name once it is on the disk; an older export goes after it."""
    for path in (*partial.rglob("*"), partial):
        _sync(path)
    replaced = _replaced(out)
    shutil.rmtree(replaced, ignore_errors=True)
    if out.exists():
        out.rename(replaced)
    try:
        partial.rename(out)
    except OSError:
        _restore(out)
        raise
    _sync(out.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _restore(out: Path) -> None:
    """Give an older export its name back when its replacement did not come to that."""
    if _replaced(out).is_dir() and not out.exists():
        _replaced(out).rename(out)


def _replaced(out: Path) -> Path:
    return out.with_name(f".{out.name}.replaced")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename(
    entries: Sequence[TensorEntry], config: ModelConfig, format: Format
) -> list[TensorEntry]:
    """Entries under the format's names, in the model's order; exactly the model's parameters."""
    check_format(config, format)
    given = {entry.name: entry for entry in entries}
    layouts = parameter_layouts(config)
    for name in sorted(layouts.keys() ^ given.keys()):
        rule = "exist" if name in layouts else "not exist"
        raise ValueError(f"checkpoint tensor {name} must {rule} for {config.layers.describe()}.")
    renamed = []
    for name, layout in layouts.items():
        entry, their_name = given[name], theirs(name, format)
        if entry.shape != layout.global_shape:
            raise ValueError(
                f"checkpoint tensor {name} {entry.shape} must have the shape of the model: "
                f"got {layout.global_shape}."
            )
        assert their_name is not None, f"{format.value} has no name for {name}"
        renamed.append(TensorEntry(their_name, entry.shape, entry.dtype, entry.load))
    return renamed
