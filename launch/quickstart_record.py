"""What the quickstart has made, from what, and how long it took: `parts.json`."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from launch.quickstart_plan import Part
from launch.schema import CONF

logger = logging.getLogger(__name__)


class Record:
    """`parts.json`: which command made each part, from which inputs, and how long it took.

    A part's stamp is a hash over its own command and those of all parts before it, and over the
    code, so that a change anywhere makes everything after it anew.
    """

    @classmethod
    def open(cls, out: Path, code: str, parts: Sequence[Part]) -> Record:
        """The record of a folder, new or continued.

        Raises:
            ValueError: parts that lie there without a record of what made them.
        """
        path = out / "parts.json"
        found = [p.output for p in parts if p.output is not None and p.output.exists()]
        if found and not path.is_file():
            raise ValueError(
                f"out ({out}) must be new or hold {path.name}: got {found[0].name} without it, and "
                "nobody knows what made it. Remove the folder, or choose another out."
            )
        return cls(path, code)

    def __init__(self, path: Path, code: str) -> None:
        self._path = path
        self._stamp = code
        self._entries: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def begin(self, part: Part) -> bool:
        """Whether the part must run; what it left behind for another stamp is removed first."""
        command = json.dumps([self._stamp, part.module, part.arguments, part.num_processes])
        self._stamp = hashlib.sha256(command.encode()).hexdigest()
        entry = self._entries.get(part.name)
        if entry is not None and entry["stamp"] == self._stamp:
            if entry["seconds"] is not None and _is_there(part.output):
                return False
        elif entry is not None and part.output is not None:
            logger.info("%s was made from something else: it is made anew", part.output)
            _remove(part.output)
        self._write(part, {"stamp": self._stamp, "seconds": None})
        return True

    def complete(self, part: Part, seconds: float) -> None:
        """Note the end of a part that ran."""
        self._write(part, {"stamp": self._stamp, "seconds": seconds})

    def seconds(self, part: Part) -> float:
        """How long a complete part took when it last ran."""
        return float(self._entries[part.name]["seconds"])

    def _write(self, part: Part, entry: dict[str, Any]) -> None:
        self._entries[part.name] = entry
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._entries, indent=1) + "\n")
        os.replace(temporary, self._path)


def code_stamp() -> str:
    """A hash over everything that decides the numbers: our code, the presets, torch."""
    digest = hashlib.sha256(torch.__version__.encode())
    for package in ("conf", "data", "launch", "models", "parallel", "training"):
        for path in sorted((CONF.parent / package).rglob("*")):
            if path.suffix in (".py", ".yaml"):
                digest.update(str(path.relative_to(CONF.parent)).encode() + path.read_bytes())
    return digest.hexdigest()


def _is_there(output: Path | None) -> bool:
    return output is None or output.exists()


def _remove(output: Path) -> None:
    if output.is_dir():
        shutil.rmtree(output)
    else:
        output.unlink(missing_ok=True)
