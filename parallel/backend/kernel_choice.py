"""Which kernel of each operation an accelerator gets: the first candidate that is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

from parallel.backend.base import KernelChoice


@dataclass(frozen=True, slots=True)
class Candidate:
    """A kernel by name, the module it needs (None: only torch) and how to get that module."""

    name: str
    module: str | None
    remedy: str


def is_installed(module: str) -> bool:
    """Whether a module can be found, without importing it (its parents are imported)."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def choose(operation: str, candidates: Sequence[Candidate]) -> KernelChoice:
    """Take the first installed candidate; the last needs nothing and is the slow way out."""
    missing: list[str] = []
    for candidate in candidates:
        if candidate.module is None:
            reason = "; ".join(missing) or "plain torch"
            return KernelChoice(operation, candidate.name, reason, is_slow=bool(missing))
        if is_installed(candidate.module):
            reason = f"{candidate.module} is installed"
            if missing:
                reason += f" ({'; '.join(missing)})"
            return KernelChoice(operation, candidate.name, reason)
        missing.append(f"{candidate.name} needs {candidate.module}: {candidate.remedy}")
    raise AssertionError(f"no candidate for {operation} works everywhere")
