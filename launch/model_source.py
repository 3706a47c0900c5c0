"""The model of a command line that leaves it to a checkpoint (`model=from_checkpoint`).

Apart from what opens checkpoints, so that a command which is given a model starts without it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from models.config import ModelConfig


def model_from_checkpoint(raw: dict[str, Any]) -> dict[str, Any]:
    """With `model=from_checkpoint` the model is the one of `init.checkpoint`.

    A run that has checkpoints of its own no longer needs it: where it is gone, they tell the model.
    """
    source = raw["init"]["checkpoint"]
    if source is None or "vocab_size" in raw["model"]:
        return raw
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
