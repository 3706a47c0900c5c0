"""A wrong command line in our words: key, value, rule, nearest choice. One line an error."""

from __future__ import annotations

import difflib
import re
from typing import Any

from launch.schema import CONF, flat_keys


class ConfigError(ValueError):
    """A command line that cannot run: one message per wrong key."""


def explain_hydra(error: Exception, schema: type[Any], overrides: list[str]) -> str:
    """Hydra's message in our form, with the nearest known keys."""
    text = str(error).strip()
    for override in overrides:
        key = override.split("=", 1)[0].lstrip("+~")
        if f"'{key}'" in text and ("not in struct" in text or "Could not override" in text):
            return _unknown(key, list(flat_keys(schema)))
    missing = re.search(r"Could not find '(.+?)/([^/']+)'", text)
    if missing:
        group, choice = missing.groups()
        options = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
        return f"{group} ({choice}) must be one of {', '.join(options)}.{_nearest(choice, options)}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(line for line in lines if "set env" not in line and "full_key" not in line)


def explain_value(item: dict[str, Any], known: list[str]) -> str:
    """One line for one pydantic error: key, value, rule, nearest choice."""
    key = ".".join(str(part) for part in item["loc"])
    kind, value = item["type"], item.get("input")
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{key} ({value}) is not a known key.{_nearest(key, known)}"
    if kind in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{key} must be set: it has no default. Add {key}=..."
    if kind == "enum":
        choices = str(item.get("ctx", {}).get("expected", "")).replace("'", "")
        words = re.split(r", | or ", choices)
        return f"{key} ({value}) must be one of {choices}.{_nearest(str(value), words)}"
    if kind == "value_error":
        message = str(item["ctx"]["error"])
        return message if not key or message.startswith(key) else f"{key}: {message}"
    rule = str(item["msg"])
    rule = rule[0].lower() + rule[1:]
    return f"{key} ({value!r}) {rule.replace('input should', 'must')}. Change {key}."


def _unknown(key: str, known: list[str]) -> str:
    """A key that is not there, or not yet: a group that is null has none."""
    if key not in known:
        return f"{key} is not a known key.{_nearest(key, known)}"
    group = key.partition(".")[0]
    return (
        f"{key} must come with {group}=NAME: there is no {group} to change. Add "
        f"{group}=from_checkpoint for the source's own, or another {group} (--help lists them)."
    )


def _nearest(key: str, known: list[str]) -> str:
    leaf = key.rsplit(".", 1)[-1]
    close = [name for name in known if name.rsplit(".", 1)[-1] == leaf]
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    close += [name for name in near if name not in close]
    return f" Did you mean {' or '.join(close[:3])}?" if close else " See --help for what exists."
