from __future__ import annotations

from pathlib import Path

import pytest

from data.documents import OnError
from launch.compose import typed
from launch.config_errors import ConfigError
from launch.prepare import PrepareConfig


def test_defaults_are_the_runs_corpus() -> None:
    config = typed({}, PrepareConfig)
    assert config.source is None
    assert config.folder == Path("outputs/data/stdlib")
    assert config.on_error is OnError.skip


@pytest.mark.parametrize(
    ("source", "folder"), [("/texts/notes", "outputs/data/notes"), ("a.jsonl", "outputs/data/a")]
)
def test_the_folder_is_named_after_the_source(source: str, folder: str) -> None:
    assert typed({"source": source}, PrepareConfig).folder == Path(folder)
    assert typed({"source": source, "out": "x/y"}, PrepareConfig).folder == Path("x/y")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sauce": "x"}, r"sauce \(x\) is not a known key. Did you mean source"),
        ({"on_error": "ignore"}, r"on_error \(ignore\) must be one of skip or fatal"),
        ({"vocab_size": "many"}, "vocab_size"),
    ],
)
def test_wrong_keys_and_values_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        typed(values, PrepareConfig)
