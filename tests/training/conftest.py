"""Prepared data that all tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.tiny_run import prepare_data


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_data(tmp_path_factory.mktemp("corpus"))
