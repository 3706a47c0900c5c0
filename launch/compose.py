"""From a command line to one typed config: Hydra composes `conf/`, pydantic checks the values.

Owns the command-line surface (`--help`, `--cfg job`, overrides, multirun, exit status, the form of
errors). Knows nothing about what a command does.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from launch.preflight import check_packages
from models.config import ModelConfig

CONF = Path(__file__).resolve().parent.parent / "conf"
Config = TypeVar("Config")
Resolve = Callable[[dict[str, Any]], dict[str, Any]]

logger = logging.getLogger("synfire")


class ConfigError(ValueError):
    """A command line that cannot run: one message per wrong key."""


def command(
    name: str, schema: type[Config], *, resolve: Resolve | None = None
) -> Callable[[Callable[[Config], None]], Callable[[], None]]:
    """Turn `body(config)` into the `main()` of `python -m launch.<name>`.

    `resolve` may complete the composed mapping before it is checked (a model read from a
    checkpoint). Exit status: 0 done, 1 the command failed, 2 the command line is wrong.
    """

    def decorate(body: Callable[[Config], None]) -> Callable[[], None]:
        def main() -> None:
            check_packages()
            configure_logging()
            arguments = drop_launcher_arguments(sys.argv[1:])
            if "--help" in arguments or "-h" in arguments:
                sys.stdout.write(help_text(name, schema, body.__doc__ or ""))
                return
            if any(argument.startswith("-") for argument in arguments):
                _run_hydra_main(name, schema, lambda raw: body(typed(raw, schema, resolve)))
            else:
                _guarded(
                    lambda: body(typed(compose_mapping(name, schema, arguments), schema, resolve))
                )

        main.__doc__ = body.__doc__
        return main

    return decorate


def _guarded(work: Callable[[], None]) -> None:
    """Turn what a command raises into one clear line and an exit status."""
    try:
        work()
    except ConfigError as error:
        _fail(error, status=2)
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("SYNFIRE_TRACEBACK"):
            raise
        _fail(error, status=1)


def compose_mapping(name: str, schema: type[Any], overrides: list[str]) -> dict[str, Any]:
    """Compose `conf/` for a command into a plain mapping.

    Raises:
        ConfigError: an unknown key or choice, with the nearest known ones.
    """
    _register(name, schema)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3", job_name=name):
            return _plain(compose(_root(name), overrides=quote_values(overrides)))
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(_explain_hydra(error, schema, overrides)) from error


def typed(raw: Mapping[str, Any], schema: type[Config], resolve: Resolve | None = None) -> Config:
    """Check a composed mapping against its dataclass tree.

    Raises:
        ConfigError: all wrong keys and values at once, one line each.
    """
    mapping = dict(raw)
    if resolve is not None:
        mapping = resolve(mapping)
    try:
        return TypeAdapter(schema).validate_python(mapping)
    except ValidationError as error:
        known = list(flat_keys(schema))
        lines = [_explain(dict(item), known) for item in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from error


def load_config(name: str, schema: type[Config], overrides: list[str]) -> Config:
    """Compose and check in one go, for tests and scripts."""
    return typed(compose_mapping(name, schema, overrides), schema)


def drop_launcher_arguments(arguments: list[str]) -> list[str]:
    """Remove `--local_rank N`, which the deepspeed launcher adds and Hydra refuses."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in ("--local_rank", "--local-rank"):
            skip = True
        elif not argument.startswith(("--local_rank=", "--local-rank=")):
            kept.append(argument)
    return kept


_BARE_PATTERN = re.compile(r"((?:\S+\.)?(?:mixers|ffns))=((?!null$)[^'\"]+)")


_BARE_TEXT = re.compile(r"(prompt|sentence)=((?!['\"]).*)", re.DOTALL)


def quote_values(overrides: list[str]) -> list[str]:
    """Quote what Hydra's grammar refuses bare: layer patterns, and text for a model to read.

    A comma separates the patterns of a sweep; a value that the user quoted stays as it is.
    """
    return [_quote_text(_quote_pattern(override)) for override in overrides]


def _quote_text(override: str) -> str:
    bare = _BARE_TEXT.fullmatch(override)
    if bare is None or not bare[2]:
        return override
    # In Hydra's strings a backslash counts only before a quote, or before the closing one.
    text = re.sub(r"(\\*)'", r"\1\1\\'", bare[2])
    text = re.sub(r"(\\+)$", r"\1\1", text)
    return f"{bare[1]}='{text}'".replace("${", "\\${")


def _quote_pattern(override: str) -> str:
    bare = _BARE_PATTERN.fullmatch(override)
    if bare is None:
        return override
    key, value = bare.groups()
    return f"{key}={','.join(repr(piece) for piece in value.split(','))}"


def configure_logging() -> None:
    """Plain lines on standard error; ranks above 0 only warn."""
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(
        level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr
    )
    for noisy in ("datasets", "fsspec", "matplotlib", "urllib3", "git"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


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


_LATER_KEYS = ("sequence_parallel", "schedule", "virtual_stages", "dp_replicate", "zero")


def _without_later(tree: dict[str, Any]) -> dict[str, Any]:
    """Keys that this release refuses stay out of the help."""
    parallel = tree.get("parallel")
    if isinstance(parallel, dict):
        tree["parallel"] = {k: v for k, v in parallel.items() if k not in _LATER_KEYS}
    engine = tree.get("engine")
    if isinstance(engine, dict):
        tree["engine"] = {k: v for k, v in engine.items() if k not in _LATER_KEYS}
    return tree


def _register(name: str, schema: type[Any]) -> None:
    store = ConfigStore.instance()
    store.store(name=f"{name}_schema", node=schema_tree(schema))
    store.store(group="model", name="base", node=schema_tree(ModelConfig))


def _root(name: str) -> str:
    return "config" if name == "train" else name


def _run_hydra_main(name: str, schema: type[Any], run: Callable[[dict[str, Any]], None]) -> None:
    """Hydra's own entry, for its flags (`--cfg`, `--multirun`, ...)."""
    _register(name, schema)
    sys.argv[1:] = quote_values(drop_launcher_arguments(sys.argv[1:]))

    def entry(config: DictConfig) -> None:
        raw = _plain(config)
        job = HydraConfig.get()
        if job.mode is RunMode.MULTIRUN and "run_dir" in raw:
            # Jobs of a sweep share the run's name, and each needs a folder of its own.
            raw["run_dir"] = str(Path(str(raw["run_dir"])) / f"job_{job.job.num}")
        _guarded(lambda: run(raw))

    hydra.main(config_path=str(CONF), config_name=_root(name), version_base="1.3")(entry)()


def _plain(config: DictConfig) -> dict[str, Any]:
    container = OmegaConf.to_container(config, resolve=True)
    assert isinstance(container, dict)
    return _prune_missing({str(key): value for key, value in container.items()})


def _prune_missing(tree: dict[str, Any]) -> dict[str, Any]:
    """Drop `???` so that the checker reports the key as missing."""
    return {
        key: _prune_missing(value) if isinstance(value, dict) else value
        for key, value in tree.items()
        if value != "???"
    }


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


def _explain_hydra(error: Exception, schema: type[Any], overrides: list[str]) -> str:
    """Hydra's message in our form, with the nearest known keys."""
    text = str(error).strip()
    for override in overrides:
        key = override.split("=", 1)[0].lstrip("+~")
        if f"'{key}'" in text and ("not in struct" in text or "Could not override" in text):
            return f"{key} is not a known key.{_nearest(key, list(flat_keys(schema)))}"
    missing = re.search(r"Could not find '(.+?)/([^/']+)'", text)
    if missing:
        group, choice = missing.groups()
        options = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
        return f"{group} ({choice}) must be one of {', '.join(options)}.{_nearest(choice, options)}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(line for line in lines if "set env" not in line and "full_key" not in line)


def _explain(item: dict[str, Any], known: list[str]) -> str:
    """One line for one pydantic error: key, value, rule, nearest choice."""
    key = ".".join(str(part) for part in item["loc"])
    kind, value = item["type"], item.get("input")
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{key} ({value}) is not a known key.{_nearest(key, known)}"
    if kind in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{key} must be set: it has no default. Add {key}=..."
    if kind == "enum":
        choices = str(item.get("ctx", {}).get("expected", "")).replace("'", "")
        return f"{key} ({value}) must be one of {choices}.{_nearest(str(value), choices.split())}"
    if kind == "value_error":
        message = str(item["ctx"]["error"])
        return message if not key or message.startswith(key) else f"{key}: {message}"
    rule = str(item["msg"])
    rule = rule[0].lower() + rule[1:]
    return f"{key} ({value!r}) {rule.replace('input should', 'must')}. Change {key}."


def _nearest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    leaf = key.rsplit(".", 1)[-1]
    close += [name for name in known if name.rsplit(".", 1)[-1] == leaf and name not in close]
    return f" Did you mean {' or '.join(close[:3])}?" if close else " See --help for what exists."


def _fail(error: Exception, *, status: int) -> None:
    """Print one clear error and leave; ranks above 0 name themselves."""
    rank = os.environ.get("RANK", "0")
    prefix = "error" if rank == "0" else f"error on rank {rank}"
    if status != 2 or rank == "0":
        sys.stderr.write(f"{prefix}: {error}\n")
        if status == 1:
            sys.stderr.write("(SYNFIRE_TRACEBACK=1 shows where it was raised)\n")
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(status)  # other ranks may hold collectives open; a clean exit would wait for them
    sys.exit(status)
