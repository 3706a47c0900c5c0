"""Start-up checks that need no device: are our import packages really ours?"""

from __future__ import annotations

import importlib.util
from pathlib import Path

PACKAGES = ("models", "parallel", "data", "training", "launch")


def check_packages() -> None:
    """Refuse to run with a foreign package under one of our names.

    Raises:
        ValueError: a package that does not lie beside this one, naming both paths.
    """
    root = Path(__file__).resolve().parent.parent
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve().parent if spec and spec.origin else None
        if found != root / name:
            raise ValueError(
                f"package {name} ({found}) must be Synfire's own: expected {root / name}. "
                "Remove the other package or run from a clean environment."
            )
