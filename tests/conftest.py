"""The order of all tests, and which shared comparisons say what differed."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.parallel.engine_oracle")

FIRST = ("parallel", "training", "launch")
"""Folders of tests with ranks and processes of their own: what is long must not begin last."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: folder_of(item.path) not in FIRST)


def folder_of(path: Path) -> str:
    """The folder below `tests` that a file lies in, or the file."""
    return path.relative_to(Path(__file__).parent).parts[0]
