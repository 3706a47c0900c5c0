"""Which kernel of each operation an accelerator gets: the first of a list that can run here."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

from parallel.backend.base import KernelChoice

Require = Callable[[str], None]

MODULES = {"fla": "fla", "flash_attn": "flash", "flex": "flex"}
"""Kernels that need more than torch, and their module in `models.kernels`."""


def require(kernel: str) -> None:
    """Ask a kernel's own module whether its library works here (this imports the library).

    Raises:
        ValueError: it does not; the message says what to install.
    """
    if kernel in MODULES:
        importlib.import_module(f"models.kernels.{MODULES[kernel]}").require()


def choose(operation: str, kernels: Sequence[str], require: Require = require) -> KernelChoice:
    """Take the first kernel that works; the last one needs nothing and is the slow way out."""
    *fast, fallback = kernels
    problems: list[str] = []
    for kernel in fast:
        try:
            require(kernel)
        except ValueError as error:
            problems.append(str(error))
            continue
        return KernelChoice(operation, kernel, " ".join(["its library works.", *problems]))
    return KernelChoice(operation, fallback, " ".join(["plain torch.", *problems]), is_slow=True)
