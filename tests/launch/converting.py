"""A tiny source with its text, and conversions of it, for the tests of `launch.convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data.prepare_corpus import prepare
from launch.convert_config import ConvertConfig
from models.conversion.huggingface import copy_tokenizer
from tests.models.conversion import tiny_sources

VOCABULARY = 300


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of a few invented documents."""
    root = tmp_path_factory.mktemp("text")
    (root / "raw").mkdir()
    for number in range(40):
        words = " ".join(f"word{(number * k) % 17} {k * k}" for k in range(120))
        (root / "raw" / f"{number}.txt").write_text(words)
    prepare(str(root / "raw"), root / "data", vocab_size=VOCABULARY, heldout_fraction=0.3)
    return root / "data"


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A tiny Qwen2 folder with the text's tokenizer."""
    folder = tmp_path_factory.mktemp("source") / "hf"
    tiny_sources.save("qwen2", folder, vocab_size=VOCABULARY, num_hidden_layers=4)
    copy_tokenizer(text / "tokenizer", folder)
    return folder


def config(source: Path, out: Path, **changes: Any) -> ConvertConfig:
    return ConvertConfig(source=str(source), out=str(out), **changes)


def hybrid(source: Path, out: Path, **changes: Any) -> ConvertConfig:
    sizes = {"sequence_length": 32, "text_tokens": 128, "mixers": "[L S]*2", "window_tokens": 8}
    return config(source, out, **{**sizes, **changes})
