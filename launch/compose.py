"""From a command line to one typed config: Hydra composes `conf/`, pydantic checks the values.

Owns the command-line surface (`--help`, `--cfg job`, overrides, multirun, exit status, the form of
errors). Knows nothing about what a command does.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping
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

from launch.config_errors import ConfigError, explain_hydra, explain_value
from launch.overrides import drop_launcher_arguments, quote_values
from launch.preflight import check_packages
from launch.schema import CONF, flat_keys, help_text, schema_tree, unset_tree
from models.config import ModelConfig
from parallel.process_group import end_process

Config = TypeVar("Config")
Resolve = Callable[[dict[str, Any]], dict[str, Any]]

logger = logging.getLogger("synfire")


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
            leave(0)

        main.__doc__ = body.__doc__
        return main

    return decorate


def leave(status: int) -> None:
    """End a command; one of many ranks ends here and now, see `end_process`."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        end_process(status)
    if status:
        sys.exit(status)


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
        raise ConfigError(explain_hydra(error, schema, overrides)) from error


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
        lines = [explain_value(dict(item), known) for item in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from error


def load_config(name: str, schema: type[Config], overrides: list[str]) -> Config:
    """Compose and check in one go, for tests and scripts."""
    return typed(compose_mapping(name, schema, overrides), schema)


def configure_logging() -> None:
    """Plain lines on standard error; ranks above 0 only warn."""
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(
        level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr
    )
    for noisy in ("datasets", "fsspec", "matplotlib", "urllib3", "git"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _register(name: str, schema: type[Any]) -> None:
    store, tree = ConfigStore.instance(), schema_tree(schema)
    if tree.get("model") is not None:
        # Defaults come with a choice of model, so that one which has none shows what was given.
        tree["model"] = unset_tree(ModelConfig)
    store.store(name=f"{name}_schema", node=tree)
    store.store(group="model", name="base", node=schema_tree(ModelConfig))
    store.store(group="model", name="unset", node=unset_tree(ModelConfig))


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


def _fail(error: Exception, *, status: int) -> None:
    """Print one clear error and leave; ranks above 0 name themselves.

    Every rank speaks, because the first that leaves makes its launcher end the others at once.
    """
    rank = os.environ.get("RANK", "0")
    prefix = "error" if rank == "0" else f"error on rank {rank}"
    hint = "(SYNFIRE_TRACEBACK=1 shows where it was raised)\n" if status == 1 else ""
    # In one piece, so that the lines of ranks do not mix.
    sys.stderr.write(f"{prefix}: {error}\n{hint}")
    # Other ranks may hold collectives open, and a clean exit would wait for them.
    leave(status)
