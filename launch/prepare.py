"""`python -m launch.prepare`: text or rows -> a tokenizer and token shards."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from data.config import STRICT, CorpusConfig
from data.documents import OnError
from data.prepare_corpus import prepare
from launch.compose import command

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """Arguments of `prepare`.

    `source` null is the Python standard library's source files; else a folder of text or code, one
    text file, .jsonl, .parquet, or a folder saved by the `datasets` library. `tokenizer` names a
    tokenizer.json, a tokenizer.model or a folder; null trains a sentencepiece model of `vocab_size`
    pieces. `out` null is a folder below outputs/data named after the source.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    source: str | None = None
    out: str | None = None
    tokenizer: str | None = None
    vocab_size: int | None = None
    eos_token: str | None = None
    max_bytes: int | None = None
    heldout_fraction: float = 0.05
    text_key: str = "text"
    on_error: OnError = OnError.skip
    num_threads: int | None = None

    @property
    def folder(self) -> Path:
        """Where the prepared folder goes."""
        if self.out is not None:
            return Path(self.out)
        if self.source is None:
            return Path(CorpusConfig().out)
        return Path("outputs/data") / Path(self.source).resolve().stem


@command("prepare", PrepareConfig)
def main(config: PrepareConfig) -> None:
    """Prepare a corpus: a tokenizer, indexed token shards and a manifest with counts and hashes.

    The same command again reuses the folder; other arguments for the same folder are refused.
    """
    manifest = prepare(
        config.source,
        config.folder,
        tokenizer=None if config.tokenizer is None else Path(config.tokenizer),
        vocab_size=config.vocab_size,
        eos_token=config.eos_token,
        max_bytes=config.max_bytes,
        heldout_fraction=config.heldout_fraction,
        text_key=config.text_key,
        on_error=config.on_error,
        num_threads=config.num_threads,
    )
    for split, count in manifest.counts.items():
        logger.info("%s: %d documents, %d tokens", split, count["documents"], count["tokens"])
    logger.info(
        "%s: vocabulary %d, %d skipped, fingerprint %s",
        config.folder,
        manifest.vocab_size,
        manifest.skipped_count,
        manifest.fingerprint[:12],
    )


if __name__ == "__main__":
    main()
