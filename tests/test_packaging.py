"""Each import package has one owner, and the installed one is this checkout's."""

from __future__ import annotations

import os
import tomllib
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import pytest

from launch.preflight import PACKAGES, check_packages

ROOT = Path(__file__).resolve().parent.parent


def test_listed_packages_are_the_folders_that_hold_code() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for name in PACKAGES
        for path in (ROOT / name).rglob("__init__.py")
    }
    assert set(listed) - {"conf"} == folders


def test_each_package_name_has_one_owner() -> None:
    try:
        distribution("synfire")
    except PackageNotFoundError:
        pytest.skip("bare checkout: no installed metadata to ask")
    owners = packages_distributions()
    for name in PACKAGES:
        assert set(owners.get(name, ["synfire"])) == {"synfire"}, name


def test_console_scripts_name_modules_that_exist() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for target in scripts.values():
        module, _, function = target.partition(":")
        assert function == "main"
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), target


def test_every_file_of_a_package_ships_with_it() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for name in (*PACKAGES, "conf"):
        patterns = ["**/*.py", "**/*.pyc", *setuptools["package-data"].get(name, [])]
        shipped = {path for pattern in patterns for path in (ROOT / name).glob(pattern)}
        found = {path for path in (ROOT / name).rglob("*") if path.is_file()}
        assert found <= shipped, found - shipped


def test_scripts_can_be_executed() -> None:
    scripts = list((ROOT / "launch").glob("*.sh"))
    assert scripts
    for path in scripts:
        assert os.access(path, os.X_OK), path


def test_a_foreign_package_is_refused_by_both_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    real = importlib.util.find_spec
    rival = tmp_path / "data" / "__init__.py"
    rival.parent.mkdir()
    rival.write_text("")

    def find(name: str, package: str | None = None) -> object:
        if name == "data":
            return importlib.util.spec_from_file_location("data", rival)
        return real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    with pytest.raises(ValueError, match="must be Synfire's own") as caught:
        check_packages()
    assert str(rival.parent) in str(caught.value)
    assert str(ROOT / "data") in str(caught.value)
