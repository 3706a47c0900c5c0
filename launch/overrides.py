"""What the user typed, before Hydra reads it: launcher arguments out, quotes where needed."""

from __future__ import annotations

import re


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
