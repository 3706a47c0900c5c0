"""The config as plain values: exact round trip, readable differences, fixed keys."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from tests.training.tiny_run import tiny_run
from training.config import RunConfig
from training.resolved_config import (
    changes,
    check_unchanged,
    config_hash,
    plain,
    read_config,
    write_config,
)

CONFIG = tiny_run(Path("prepared"), Path("run"), optimizer={"eps": 1e-12})


def test_a_written_config_reads_back_as_the_same_config(tmp_path: Path) -> None:
    write_config(tmp_path / "config.yaml", CONFIG)
    values = read_config(tmp_path / "config.yaml")
    assert values == plain(CONFIG)
    assert TypeAdapter(RunConfig).validate_python(values) == CONFIG
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_the_hash_depends_on_every_leaf_and_on_no_order() -> None:
    values = plain(CONFIG)
    assert config_hash(dict(reversed(values.items()))) == config_hash(values)
    other = tiny_run(Path("prepared"), Path("run"), optimizer={"eps": 1e-11})
    assert config_hash(plain(other)) != config_hash(values)


def test_differences_are_leaves_with_both_values() -> None:
    old = {"a": {"b": 1, "c": [1]}, "d": {}, "e": 1}
    new = {"a": {"b": 2, "c": [1]}, "d": {"f": 3}, "g": None}
    assert changes(old, new) == [("a.b", 1, 2), ("d", {}, None), ("d.f", None, 3), ("e", 1, None)]


def test_a_fixed_key_is_refused_and_others_are_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_config(tmp_path / "config.yaml", CONFIG)
    other = tiny_run(Path("prepared"), Path("run"), optimizer={"eps": 1e-12}, seed=9)
    with pytest.raises(ValueError, match=r"seed \(9\) must stay what .* began with: got 3"):
        check_unchanged(tmp_path / "config.yaml", other)
    check_unchanged(tmp_path / "config.yaml", tiny_run(Path("prepared"), Path("run")))
    assert caplog.messages == ["resuming with optimizer.eps changed from 1e-12 to 1e-08"]


def test_a_missing_config_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_unchanged(tmp_path / "config.yaml", CONFIG)
    assert "is missing: changes since the run began cannot be shown" in caplog.text
