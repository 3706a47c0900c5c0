"""The model of a command line that leaves it to a checkpoint (`model=from_checkpoint`).

Apart from what opens checkpoints, so that a command which is given a model starts without it.
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from models.config import ModelConfig

REQUIRED = frozenset(
    each.name
    for each in fields(ModelConfig)
    if each.default is MISSING and each.default_factory is MISSING
)
"""Keys of a model that have no default, so that a model given by hand has some of them."""


def model_from_checkpoint(raw: dict[str, Any]) -> dict[str, Any]:
    """With `model=from_checkpoint` the model is the one of `init.checkpoint`.

    A run that has checkpoints of its own no longer needs it: where it is gone, they tell the model.

    Raises:
        ValueError: there is no `init.checkpoint`, or none there.
    """
    source, given = raw["init"]["checkpoint"], REQUIRED.intersection(raw["model"])
    if "vocab_size" in given:
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
    return {**raw, "model": checkpoint_model(own if is_own else source)}


def checkpoint_model(path: str | Path) -> dict[str, Any]:
    """The model of a checkpoint as plain config values (`train model=from_checkpoint`).

    Raises:
        ValueError: no checkpoint there.
    """
    from training.weight_source import open_weights  # a second of imports

    model = open_weights(path, check_files=False).model
    values: dict[str, Any] = TypeAdapter(ModelConfig).dump_python(model, mode="json")
    return values
