"""Prepared folders made from lists of token ids, without text or tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.indexed import ShardWriter
from data.prepared import Manifest, describe_files, fingerprint_of

EOS = 0


def write_folder(
    folder: Path,
    documents: Sequence[Sequence[int]],
    *,
    heldout: Sequence[Sequence[int]] = (),
    vocab_size: int = 100,
    tokenizer_sha256: str = "t" * 64,
) -> Path:
    """A prepared folder with these documents; each must end with `EOS` itself."""
    folder.mkdir(parents=True)
    counts = {}
    for split, members in (("train", documents), ("heldout", heldout)):
        if members:
            writer = ShardWriter(folder / split, vocab_size=vocab_size)
            for document in members:
                writer.add(np.array(document, dtype=np.int32))
            writer.close()
            counts[split] = {"documents": writer.num_documents, "tokens": writer.num_tokens}
    files = describe_files(folder)
    manifest = Manifest(
        source="test",
        arguments={},
        vocab_size=vocab_size,
        eos_token_id=EOS,
        tokenizer_sha256=tokenizer_sha256,
        token_dtype="uint16",
        counts=counts,
        skipped_count=0,
        skipped=[],
        text_sha256="",
        files=files,
        fingerprint=fingerprint_of(files, vocab_size, EOS, tokenizer_sha256),
    )
    manifest.write(folder)
    return folder


def random_documents(
    count: int, *, seed: int = 0, longest: int = 30, vocab_size: int = 100
) -> list[list[int]]:
    """Documents of 1 ... `longest` tokens, the last being `EOS`."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, longest, count)
    return [[*rng.integers(1, vocab_size, size).tolist(), EOS] for size in sizes]


def unique_documents(lengths: Sequence[int]) -> list[list[int]]:
    """Documents in which every token id occurs once over all of them (so positions show)."""
    ids = iter(range(1, 10_000))
    return [[next(ids) for _ in range(length)] for length in lengths]
