"""Rules of the house that no linter knows: device words, file sizes, folders without surprises."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("models", "parallel", "data", "training", "launch")
DEVICE_WORD = re.compile(r"torch\.cuda|\bcuda\b|\bnccl\b")


def sources() -> list[Path]:
    return [path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))]


def device_words(source: str) -> list[str]:
    """Device names in code: attribute chains and string literals, docstrings left out."""
    tree = ast.parse(source)
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "cuda":
            found.append(ast.unparse(node))
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in docs
            and re.fullmatch(r"(cuda|nccl)(:\d+)?", node.value)
        ):
            found.append(node.value)
    return found


ALLOWED = ("parallel/backend/", "parallel/config.py")
"""The back ends own the device words; the config only names the choice."""


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_device_words_stay_in_the_backends(path: Path) -> None:
    relative = str(path.relative_to(ROOT))
    if not relative.startswith(ALLOWED):
        assert device_words(path.read_text()) == []


def test_the_device_rule_sees_a_literal_and_an_attribute() -> None:
    assert device_words("x = torch.cuda.is_available()") == ["torch.cuda"]
    assert device_words("x = t.to('cuda:0')") == ["cuda:0"]
    assert device_words('"""cuda in prose"""\n') == []


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_small_enough_to_read(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def test_every_code_folder_is_a_regular_package_and_conf_is_not() -> None:
    for path in sources():
        assert (path.parent / "__init__.py").exists(), path.parent
    assert not list((ROOT / "conf").rglob("*.py"))


def test_gitignore_entries_are_anchored() -> None:
    loose = {"__pycache__/", "*.pyc"}
    for line in (ROOT / ".gitignore").read_text().splitlines():
        assert line.startswith("/") or line in loose, line
