from __future__ import annotations

from pathlib import Path

import pytest

from data.tokenizer import load_tokenizer
from data.tokenizer_training import SENTENCE_CHARACTERS, sample_stretches, train_sentencepiece

CODE = "def f(self):\n    if self:\n\t\treturn None\n\n" * 50


def test_indentation_and_line_ends_become_pieces(tmp_path: Path) -> None:
    train_sentencepiece([CODE], tmp_path, vocab_size=310)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 310
    assert len(tokenizer.encode("    if")) <= 2
    assert len(tokenizer.encode("\t")) == 1
    assert len(tokenizer.encode("):\n")) == 1


def test_training_twice_gives_the_same_file(tmp_path: Path) -> None:
    for name in "ab":
        train_sentencepiece([CODE, CODE.upper()], tmp_path / name, vocab_size=320)
    assert load_tokenizer(tmp_path / "a").sha256 == load_tokenizer(tmp_path / "b").sha256


@pytest.mark.parametrize("separator", ["\t", "\n", "\r\n"])
def test_text_around_control_characters_is_learnt(tmp_path: Path, separator: str) -> None:
    text = f"uncommon{separator}common{separator}"
    train_sentencepiece([text * 20_000], tmp_path, vocab_size=281)
    assert len(load_tokenizer(tmp_path).encode(text)) <= 6


@pytest.mark.parametrize(
    ("vocab_size", "reason"),
    [(50_000, "too high.*<= "), (100, "smaller than required_chars")],
)
def test_a_vocabulary_that_does_not_suit_is_refused(
    tmp_path: Path, vocab_size: int, reason: str
) -> None:
    with pytest.raises(ValueError, match=rf"vocab_size \({vocab_size}\) must suit.*{reason}"):
        train_sentencepiece([CODE], tmp_path, vocab_size=vocab_size)


def test_the_sample_is_spread_and_bounded() -> None:
    size = SENTENCE_CHARACTERS
    texts = [chr(ord("a") + index) * (10 * size) for index in range(20)]
    everything = list(sample_stretches(texts, share=1.0, max_bytes=10**9))
    assert "".join(everything) == "".join(texts)
    tenth = list(sample_stretches(texts, share=0.1, max_bytes=10**9))
    assert [text[0] for text in tenth] == [text[0] for text in texts]
    bounded = list(sample_stretches(texts, share=1.0, max_bytes=3 * size))
    assert len(bounded) == 3
