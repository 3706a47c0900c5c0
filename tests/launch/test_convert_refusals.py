"""What `launch.convert` refuses, before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launch.compose import load_config
from launch.config_errors import ConfigError
from launch.convert import convert
from launch.convert_config import ConvertConfig
from tests.launch.converting import config, hybrid, source, text

pytest.importorskip("transformers")
__all__ = ["source", "text"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixers": "[L S]*3"}, r"num_hidden_layers \(6\) must equal the source's: got 4"),
        ({"mixers": "[L S]*2", "window_tokens": None}, r"window_tokens \(None\) must be at least"),
        ({"mixers": "[L X]*2"}, "must use F, S, L"),
        ({"gate_init": 0.1}, "gate_init .* half-life of 1 to"),
        ({"text": "/no/such/place"}, "must be a prepared folder or a text file: got neither"),
    ],
)
def test_what_cannot_be_converted_writes_nothing(
    source: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        convert(hybrid(source, tmp_path / "out", **changes))
    assert list(tmp_path.iterdir()) == []


def test_only_older_checkpoints_are_replaced(source: Path, tmp_path: Path) -> None:
    for _ in range(2):
        convert(config(source, tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for place in (source, source / "config.json"):
        with pytest.raises(ValueError, match="must be new, empty or an older checkpoint"):
            convert(config(source, place))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["align.tokens=5"], r"align.tokens \(5\) must be 0 without sample text"),
        (["linear.key_bias=centre"], r"key_bias \(centre\) must have sample text"),
        (["align.tokens=-1", "text=x"], r"align.tokens \(-1\) must be at least 0"),
        (["align.learning_rate=0", "text=x"], "learning_rate .* must be above 0"),
        (["text_tokens=0"], r"text_tokens \(0\) must be at least 1"),
        (["linear.key_bias=drop"], "key_bias .* must be one of keep, zero or centre"),
        (["upcycle.mode=measured"], r"upcycle.mode \(measured\) must have sample text"),
        (["upcycle.mode=paper", "upcycle.router_std=0"], r"router_std \(0.0\) must be above 0"),
        (["upcycle.router_std=0.1"], r"router_std \(0.1\) has no effect with .*mode exact"),
        (["upcycle.mode=random"], "mode .* must be one of exact, measured or paper"),
        (["linear.keybias=zero"], "Did you mean .*linear.key_bias"),
    ],
)
def test_impossible_settings_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("convert", ConvertConfig, ["source=a", "out=b", *overrides])


def test_a_prepared_folder_is_not_written_over(source: Path, text: Path) -> None:
    with pytest.raises(ValueError, match=r"out .* must be new, empty or an older checkpoint"):
        convert(config(source, text))
