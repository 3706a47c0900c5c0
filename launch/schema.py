"""A command's keys from its dataclass tree: as a YAML tree, as dotted names, as `--help`."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

CONF = Path(__file__).resolve().parent.parent / "conf"


def schema_tree(schema: type[Any]) -> dict[str, Any]:
    """Every key of a dataclass tree with its default; required ones are `???`."""
    hints = typing.get_type_hints(schema)
    tree: dict[str, Any] = {}
    for field in dataclasses.fields(schema):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            tree[field.name] = schema_tree(kind)
        elif field.default is not dataclasses.MISSING:
            tree[field.name] = _yaml_value(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            tree[field.name] = _yaml_value(field.default_factory())
        else:
            tree[field.name] = {} if typing.get_origin(kind) is dict else "???"
    return tree


def unset_tree(schema: type[Any]) -> dict[str, Any]:
    """Every key of a dataclass tree, all to be told by something else (`???`)."""

    def unset(tree: dict[str, Any]) -> dict[str, Any]:
        return {key: unset(each) if isinstance(each, dict) else "???" for key, each in tree.items()}

    return unset(schema_tree(schema))


def flat_keys(schema: type[Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of every leaf key, optional sub-trees included."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        inner = _dataclass_in(hints[field.name])
        name = f"{prefix}{field.name}"
        if inner is None or typing.get_origin(hints[field.name]) is dict:
            yield name
        if inner is not None:
            star = "*." if typing.get_origin(hints[field.name]) is dict else ""
            yield from flat_keys(inner, f"{name}.{star}")


def help_text(name: str, schema: type[Any], purpose: str) -> str:
    """What `--help` prints: purpose, choices of each group, every key with its default."""
    groups = {
        folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
        for folder in sorted(CONF.iterdir())
        if folder.is_dir()
    }
    names = {field.name for field in dataclasses.fields(schema)}
    used = {group: options for group, options in groups.items() if group in names}
    lines = [f"python -m launch.{name} key=value ...", "", purpose.strip(), ""]
    if used:
        lines += ["Groups (group=choice):"]
        lines += [f"  {group}: {', '.join(options)}" for group, options in used.items()]
        lines += [""]
    tree = OmegaConf.to_yaml(OmegaConf.create(_without_later(schema_tree(schema))))
    lines += ["Keys and defaults (??? must be set):", *(f"  {row}" for row in tree.splitlines())]
    lines += ["", "Also: --cfg job (print the composed config), --multirun (sweeps)."]
    return "\n".join(lines) + "\n"


_LATER_KEYS = ("cp", "zero")


def _without_later(tree: dict[str, Any]) -> dict[str, Any]:
    """Keys that this release refuses stay out of the help."""
    parallel = tree.get("parallel")
    if isinstance(parallel, dict):
        tree["parallel"] = {k: v for k, v in parallel.items() if k not in _LATER_KEYS}
    engine = tree.get("engine")
    if isinstance(engine, dict):
        tree["engine"] = {k: v for k, v in engine.items() if k not in _LATER_KEYS}
    return tree


def _yaml_value(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _yaml_value(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return value


def _dataclass_in(kind: Any) -> type[Any] | None:
    """The dataclass inside `X`, `X | None` or `dict[str, X]`."""
    options = [kind]
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        options = list(typing.get_args(kind))
    elif typing.get_origin(kind) is dict:
        options = [typing.get_args(kind)[1]]
    for option in options:
        if dataclasses.is_dataclass(option) and isinstance(option, type):
            return option
    return None
