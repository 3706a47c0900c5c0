"""Documents -> tokenizer, token shards and manifest in one folder: the pipeline of `prepare`.

Everything streams in batches of `BATCH_BYTES` of text, so memory does not grow with the source.
The result depends on the source and the arguments only, not on threads, time or directory order.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.config import CorpusConfig
from data.corpus import Corpus
from data.documents import Damage, Document, OnError
from data.indexed import token_dtype
from data.prepared import (
    MANIFEST_FILE,
    TOKENIZER_FOLDER,
    Manifest,
    check_files,
    describe_files,
    fingerprint_of,
    read_manifest,
)
from data.progress import Progress
from data.publish import exclusive, staged
from data.split import SplitWriter, heldout_hash, no_training_document
from data.tokenizer import Tokenizer, document_tokens, load_tokenizer
from data.tokenizer_training import sample_stretches, train_sentencepiece

logger = logging.getLogger(__name__)

DEFAULT_VOCAB_SIZE = 2048
BATCH_BYTES = 1024 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareOptions:
    """What to prepare. `vocab_size` belongs to training a tokenizer; a given one must agree."""

    source: str | None = None
    vocab_size: int | None = None
    tokenizer: Path | None = None
    eos_token: str | None = None
    max_bytes: int | None = None
    heldout_fraction: float = 0.05
    text_key: str = "text"
    on_error: OnError = OnError.skip
    document_bytes: int = 4 * 1024 * 1024
    tokenizer_sample_bytes: int = 10 * 1024 * 1024
    num_threads: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.heldout_fraction < 1.0:
            raise ValueError(f"heldout_fraction ({self.heldout_fraction}) must be in [0, 1).")
        object.__setattr__(self, "on_error", OnError(self.on_error))  # words are welcome too

    def corpus(self) -> Corpus:
        """The source as a stream of documents."""
        return Corpus(
            root=None if self.source is None else Path(self.source).resolve(),
            text_key=self.text_key,
            max_bytes=self.max_bytes,
            document_bytes=self.document_bytes,
        )

    def arguments(self) -> dict[str, Any]:
        """What decides the content, as JSON values; compared on a rerun."""
        given = None if self.tokenizer is None else load_tokenizer(self.tokenizer)
        trains = given is None
        return {
            "source": None if self.source is None else str(Path(self.source).resolve()),
            "tokenizer": None if given is None else given.sha256,
            "vocab_size": (self.vocab_size or DEFAULT_VOCAB_SIZE) if trains else None,
            "tokenizer_sample_bytes": self.tokenizer_sample_bytes if trains else None,
            "eos_token": self.eos_token,
            "max_bytes": self.max_bytes,
            "heldout_fraction": self.heldout_fraction,
            "text_key": self.text_key,
            "document_bytes": self.document_bytes,
        }


def prepare(source: str | None, out: Path, **options: Any) -> Manifest:
    """Prepare `source` (None: the standard library) into `out`, or reuse what lies there.

    `options` are the fields of `PrepareOptions`. `out` appears whole or not at all; other processes
    that ask for the same folder wait for this one.

    Raises:
        ValueError: an unusable source or tokenizer, no document, an `out` prepared with other
            arguments or damaged since, a damaged document under `on_error=fatal`.
    """
    given = PrepareOptions(source=source, **options)
    arguments = given.arguments()
    reused = _reusable(out, arguments, given.on_error)
    if reused is None:
        given.corpus()  # a source that is not there leaves no trace
        with exclusive(out):
            reused = _reusable(out, arguments, given.on_error)
            if reused is None:
                with staged(out) as folder:
                    return _build(given, arguments, folder)
    logger.info("%s is prepared already (%s)", out, _summary(reused))
    return reused


def ensure_prepared(config: CorpusConfig) -> Path:
    """Prepare a run's corpus on first use, by whichever of its processes comes first."""
    out = Path(config.out)
    prepare(
        config.source,
        out,
        max_bytes=config.max_bytes,
        vocab_size=config.vocab_size,
        heldout_fraction=config.heldout_fraction,
    )
    return out


def _reusable(out: Path, arguments: dict[str, Any], on_error: OnError) -> Manifest | None:
    if not (out / MANIFEST_FILE).is_file():
        return None
    manifest = read_manifest(out)
    for name, value in arguments.items():
        if manifest.arguments.get(name) != value:
            raise ValueError(
                f"{name} ({value}) must be what {out} was prepared with: got "
                f"{manifest.arguments.get(name)}. Choose another out or remove that folder."
            )
    if on_error is OnError.fatal and manifest.skipped_count:
        raise ValueError(
            f"on_error (fatal) must meet no damaged document: {out} was prepared with "
            f"{manifest.skipped_count} skipped, first {manifest.skipped[0]}. Repair the source and "
            "choose another out, or set on_error=skip."
        )
    check_files(out, manifest)
    return manifest


def _build(options: PrepareOptions, arguments: dict[str, Any], folder: Path) -> Manifest:
    corpus = options.corpus()
    tokenizer = _tokenizer(options, corpus, folder / TOKENIZER_FOLDER)
    dtype = token_dtype(tokenizer.vocab_size)
    damage = Damage(options.on_error)
    text_hash = hashlib.sha256()
    writer = SplitWriter(folder, tokenizer.vocab_size, options.heldout_fraction)
    progress = Progress(corpus.size_bytes())
    threads = options.num_threads or len(os.sched_getaffinity(0))
    try:
        for batch in batches(corpus.documents(damage)):
            texts = [document.text for document in batch]
            encoded = tokenizer.encode_batch(texts, num_threads=threads)
            for document, ids in zip(batch, encoded, strict=True):
                text_hash.update(hashlib.sha256(document.text.encode()).digest())
                writer.add(document, document_tokens(tokenizer, ids))
                progress.add(len(document.text.encode()), len(ids) + 1)
            progress.report()
        if progress.num_documents == 0:
            raise _empty(corpus, damage)
        counts = writer.close()
    except BaseException:
        writer.abandon()
        raise
    progress.report(is_final=True)
    files = describe_files(folder)
    facts = (tokenizer.vocab_size, tokenizer.eos_token_id, tokenizer.sha256)
    manifest = Manifest(
        source=corpus.description,
        arguments=arguments,
        vocab_size=tokenizer.vocab_size,
        eos_token_id=tokenizer.eos_token_id,
        tokenizer_sha256=tokenizer.sha256,
        token_dtype=dtype.__name__,
        counts=counts,
        skipped_count=damage.count,
        skipped=damage.named,
        text_sha256=text_hash.hexdigest(),
        files=files,
        fingerprint=fingerprint_of(files, *facts),
    )
    manifest.write(folder)
    return manifest


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Group documents until they hold `BATCH_BYTES` characters."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _tokenizer(options: PrepareOptions, corpus: Corpus, folder: Path) -> Tokenizer:
    """Copy the given tokenizer into `folder`, or train one there on training documents only."""
    if options.tokenizer is not None:
        given = load_tokenizer(options.tokenizer, eos_token=options.eos_token)
        if options.vocab_size not in (None, given.vocab_size):
            raise ValueError(
                f"vocab_size ({options.vocab_size}) must be the given tokenizer's: "
                f"got {given.vocab_size} in {given.path}. Leave vocab_size out."
            )
        given.copy_to(folder)
        return load_tokenizer(folder)
    limit, size = options.tokenizer_sample_bytes, corpus.size_bytes()
    share = min(1.0, limit / max(1, size))
    logger.info("sampling %.1f of %.1f MB for the tokenizer", min(limit, size) / 1e6, size / 1e6)
    # a list, bounded by `limit`: errors raised inside the trainer's iterator would lose their type
    sample = list(sample_stretches(_training_texts(options, corpus), share=share, max_bytes=limit))
    train_sentencepiece(sample, folder, vocab_size=options.vocab_size or DEFAULT_VOCAB_SIZE)
    trained = load_tokenizer(folder, eos_token=options.eos_token)
    trained.copy_to(folder)
    return trained


def _training_texts(options: PrepareOptions, corpus: Corpus) -> Iterator[str]:
    """The texts that are not held out."""
    damage = Damage(options.on_error, quiet=True)
    found = kept = 0
    for document in corpus.documents(damage):
        found += 1
        if heldout_hash(document) >= options.heldout_fraction:
            kept += 1
            yield document.text
    if found == 0:
        raise _empty(corpus, damage)
    if kept == 0:
        raise no_training_document(options.heldout_fraction, found)


def _empty(corpus: Corpus, damage: Damage) -> ValueError:
    first = f"; first: {damage.named[0]}" if damage.named else ""
    return ValueError(
        f"source ({corpus.description}) must hold at least one document: got 0, and "
        f"{damage.count} damaged{first}. Files are chosen by their ending: text and code, .jsonl, "
        ".parquet; text_key names the column of rows."
    )


def _summary(manifest: Manifest) -> str:
    parts = [
        f"{split} {count['documents']} documents, {count['tokens']} tokens"
        for split, count in manifest.counts.items()
    ]
    return "; ".join([*parts, f"vocabulary {manifest.vocab_size}"])
