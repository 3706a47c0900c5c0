"""Trains a sentencepiece BPE model whose round trip is exact, on a bounded sample of documents.

Exact means: identity normalisation, no added or removed white space, runs of spaces and line ends
as pieces of their own, byte fallback for everything else.
"""

from __future__ import annotations

import io
import logging
import math
import time
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from data.tokenizer import MODEL_FILE, SentencePieceTokenizer

logger = logging.getLogger(__name__)

SENTENCE_CHARACTERS = 2000
"""Texts are handed over in stretches of this length, line ends included."""


def train_sentencepiece(texts: Iterable[str], folder: Path, *, vocab_size: int) -> None:
    """Train on `texts` and write `tokenizer.model` into `folder`.

    Raises:
        ValueError: a vocabulary that the text cannot fill or that cannot hold its characters.
    """
    from sentencepiece import SentencePieceTrainer

    started = time.monotonic()
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=chain.from_iterable(map(_stretches, texts)),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * SENTENCE_CHARACTERS,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"vocab_size ({vocab_size}) must suit the training text: {_reason(error)}. "
            "Change vocab_size or give more text."
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MODEL_FILE).write_bytes(model.getvalue())
    SentencePieceTokenizer(folder / MODEL_FILE).copy_to(folder)
    logger.info(
        "trained a tokenizer of %d pieces in %.1f s", vocab_size, time.monotonic() - started
    )


def sample_stretches(texts: Iterable[str], *, share: float, max_bytes: int) -> Iterator[str]:
    """Every `1 / share`-th stretch of the texts until `max_bytes` are taken, evenly spread."""
    taken = seen = 0
    for text in texts:
        for stretch in _stretches(text):
            seen += 1
            if math.ceil(seen * share) == math.ceil((seen - 1) * share):
                continue
            taken += len(stretch.encode())
            if taken > max_bytes:
                return
            yield stretch


def _stretches(text: str) -> Iterator[str]:
    for start in range(0, len(text), SENTENCE_CHARACTERS):
        yield text[start : start + SENTENCE_CHARACTERS]


def _reason(error: Exception) -> str:
    """The last clause of the library's message, without its source line."""
    text = str(error).strip().splitlines()[-1]
    return text.rsplit("] ", 1)[-1].strip().rstrip(".")
