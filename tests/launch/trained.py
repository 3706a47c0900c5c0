"""A small trained run for the tests of commands that read checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.training.tiny_run import prepare_data, tiny_run
from training.run import run


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of 300 tokens."""
    return prepare_data(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="session")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of six steps of a tiny hybrid with spiking."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    run(tiny_run(prepared, run_dir))
    return run_dir


def without_tokenizer(checkpoint: Path, folder: Path) -> Path:
    """A copy of a checkpoint that was made without a tokenizer."""
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("tokenizer"))
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {name: fact for name, fact in manifest["files"].items() if "tokenizer" not in name}
    manifest |= {"tokenizer": None, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder
