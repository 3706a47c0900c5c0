"""The model of a command line that leaves it to a checkpoint (`model=from_checkpoint`).

Apart from what opens checkpoints, so that a command which is given a model starts without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from models.config import ModelConfig
from models.conversion.huggingface import CONFIG, SafetensorsFolder
from models.conversion.source_config import read_config

OPTIONAL = frozenset(
    each.name
    for each in fields(ModelConfig)
    if each.default is not MISSING or each.default_factory is not MISSING
)
"""Keys of a model that have a default, so that a preset has them all."""


def model_from_checkpoint(raw: dict[str, Any]) -> dict[str, Any]:
    """With `model=from_checkpoint` the model is `init.checkpoint`'s, with the keys that are given.

    A run that has checkpoints of its own no longer needs it: where it is gone, they tell the model.

    Raises:
        ValueError: there is no `init.checkpoint`, or none there.
    """
    source, given = raw["init"]["checkpoint"], _given(raw["model"])
    if given.keys() >= OPTIONAL:
        return raw
    if source is None:
        if given:
            return raw
        raise ValueError(
            "init.checkpoint (null) must be a checkpoint for model=from_checkpoint. Add "
            "init.checkpoint=FOLDER, or choose another model=."
        )
    own = Path(str(raw.get("run_dir")))
    is_own = not Path(source).exists() and (own / "checkpoints").is_dir()
    return {**raw, "model": _merged(checkpoint_model(own if is_own else source), given)}


def model_from_source(raw: dict[str, Any]) -> dict[str, Any]:
    """With `model=from_checkpoint` a conversion starts from `source`'s model likewise.

    Raises:
        ValueError: no Hugging Face folder there, or one that we would not honour.
    """
    if raw.get("model") is None or "source" not in raw:
        return raw
    given = _given(raw["model"])
    if given.keys() >= OPTIONAL:
        return raw
    own = _plain(read_config(open_source(raw["source"]).config))
    return {**raw, "model": _merged(own, given)}


def open_source(path: str | Path) -> SafetensorsFolder:
    """A Hugging Face folder to convert.

    Raises:
        ValueError: it is none; a checkpoint or a run of ours says how to make one of it.
    """
    folder = Path(path)
    is_ours = (folder / "manifest.json").is_file() or (folder / "checkpoints").is_dir()
    if is_ours and not (folder / CONFIG).is_file():
        raise ValueError(
            f"source ({folder}) must be a Hugging Face folder: got a Synfire checkpoint. Write one "
            f"of it first: python -m launch.export checkpoint={folder} out=DIR."
        )
    return SafetensorsFolder(folder)


def checkpoint_model(path: str | Path) -> dict[str, Any]:
    """The model of a checkpoint as plain config values (`train model=from_checkpoint`).

    Raises:
        ValueError: no checkpoint there.
    """
    from training.weight_source import open_weights  # a second of imports

    return _plain(open_weights(path, check_files=False).model)


def _plain(model: ModelConfig) -> dict[str, Any]:
    values: dict[str, Any] = TypeAdapter(ModelConfig).dump_python(model, mode="json")
    return values


def _given(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Without groups of which no key is given."""
    found = {
        key: _given(value) if isinstance(value, dict) else value for key, value in tree.items()
    }
    return {key: value for key, value in found.items() if value != {}}


def _merged(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the given keys, group by group."""
    return {
        **base,
        **{
            key: _merged(base.get(key) or {}, value) if isinstance(value, dict) else value
            for key, value in given.items()
        },
    }
