"""The config of a run as plain values: written to `config.yaml`, hashed, compared on resume."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from pydantic import TypeAdapter

from training.config import RunConfig

logger = logging.getLogger(__name__)

Change = tuple[str, Any, Any]
"""A dotted key with its old and its new value."""

FIXED_KEYS = ("model.", "seed", "optimizer.name", "optimizer.freeze")
"""Beginnings of keys that a resumed run may not change."""


def plain(config: RunConfig) -> dict[str, Any]:
    """The config as JSON values."""
    values: dict[str, Any] = TypeAdapter(RunConfig).dump_python(config, mode="json")
    return values


def config_hash(resolved: Mapping[str, Any]) -> str:
    """SHA-256 over plain values, keys sorted."""
    return hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest()


def write_config(path: Path, config: RunConfig) -> None:
    """Write the config in one rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(OmegaConf.to_yaml(OmegaConf.create(plain(config))), encoding="utf-8")
    os.replace(temporary, path)


def read_config(path: Path) -> dict[str, Any]:
    """Read what `write_config` wrote, as plain values."""
    values = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def check_unchanged(path: Path, config: RunConfig) -> None:
    """Show every difference to the config that a run began with.

    Raises:
        ValueError: a difference that would make it another run, with both values.
    """
    if not path.is_file():
        logger.warning("%s is missing: changes since the run began cannot be shown.", path)
        return
    found = changes(read_config(path), plain(config))
    for key, old, new in found:
        if key.startswith(FIXED_KEYS):
            raise ValueError(
                f"{key} ({new}) must stay what this run_dir began with: got {old}. Restore it, or "
                "use another run_dir (with init.checkpoint=DIR to keep the weights)."
            )
    for key, old, new in found:
        logger.warning("resuming with %s changed from %s to %s", key, old, new)


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Sequence[Change]:
    """Leaves that differ between two plain configs, sorted by key."""
    before, after = _flat(old), _flat(new)
    return [
        (key, before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            leaves.update(_flat(value, f"{prefix}{key}."))
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves
