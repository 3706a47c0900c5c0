"""One file or saved dataset -> its documents, one at a time. Knows no folders and no tokens.

Plain text, jsonl and parquet are read here, saved datasets through `datasets`. The library's jsonl
reader drops a whole block of rows for one bad line (0 of 201 came through), where here the line
names itself and only it is lost; its parquet reader holds a whole row group (455 MiB for 150 MB of
text in one group, 112 MiB here).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

NAMED_DAMAGE_LIMIT = 100
"""Damaged documents that are kept by name; the rest is only counted."""


PARQUET_BATCH_ROWS = 64
PARQUET_BUFFER_BYTES = 1024 * 1024


class OnError(Enum):
    """What happens to a document that cannot be read."""

    skip = "skip"
    fatal = "fatal"


@dataclass(frozen=True, slots=True)
class Document:
    """A text with its name; `split_key` decides train or held-out (None: the text itself)."""

    name: str
    text: str
    split_key: str | None = None


@dataclass(slots=True)
class Damage:
    """The documents that could not be read: named and counted, or fatal."""

    on_error: OnError = OnError.skip
    quiet: bool = False
    count: int = 0
    named: list[str] = field(default_factory=list)

    def report(self, name: str, reason: str) -> None:
        """Record one damaged document.

        Raises:
            ValueError: under `OnError.fatal`.
        """
        if self.on_error is OnError.fatal:
            raise ValueError(
                f"{name} must be readable: {reason}. Repair or remove it, or set on_error=skip."
            )
        self.count += 1
        if len(self.named) < NAMED_DAMAGE_LIMIT:
            self.named.append(f"{name}: {reason}")
        if not self.quiet:
            logger.warning("skipped %s: %s", name, reason)


def read_text(
    path: Path, name: str, *, document_bytes: int, damage: Damage, numbered: bool = False
) -> Iterator[Document]:
    """Read a UTF-8 file exactly (line ends, tabs and indentation untouched).

    A file above `document_bytes` is cut after line ends into documents `name#0`, `name#1`, ...;
    `numbered` names a single piece that way too.
    """
    num_kept = 0
    try:
        pieces = _with_alone(_pieces(path, document_bytes))
        for index, (text, is_alone) in enumerate(pieces):
            piece = name if is_alone and not numbered else f"{name}#{index}"
            if text:
                yield Document(piece, text, split_key=piece)
                num_kept += 1
    except (OSError, ValueError) as error:
        kept = f"; the {num_kept} pieces before are kept, the rest is lost" if num_kept else ""
        damage.report(name, f"{error}{kept}")


def _with_alone(pieces: Iterator[str]) -> Iterator[tuple[str, bool]]:
    """Pair each piece with whether it is the only one, reading one piece ahead."""
    first = next(pieces, None)
    second = next(pieces, None)
    if first is not None:
        yield first, second is None
    if second is not None:
        yield second, False
    for piece in pieces:
        yield piece, False


def _pieces(path: Path, limit: int) -> Iterator[str]:
    """Decoded pieces of a file.

    Raises:
        ValueError: no text, with the byte of the file.
    """
    carry, offset = b"", 0
    with path.open("rb") as stream:
        while block := stream.read(max(1, limit - len(carry))):
            block = carry + block
            carry = b""
            if len(block) >= limit and stream.peek(1):
                cut = _cut(block)
                block, carry = block[:cut], block[cut:]
            yield _decoded(block, offset)
            offset += len(block)
    if carry:
        yield _decoded(carry, offset)


def _decoded(block: bytes, offset: int) -> str:
    if (nul := block.find(b"\0")) >= 0:
        raise ValueError(f"holds a NUL at byte {offset + nul}, so it is not text")
    try:
        return block.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"at byte {offset + error.start}"
        raise ValueError(f"not UTF-8 {where} ({error.reason})") from error


def _cut(block: bytes) -> int:
    """Where to cut: after the last line end, else before the last character's first byte."""
    line = block.rfind(b"\n") + 1
    if line:
        return line
    cut = len(block) - 1
    while cut > 1 and block[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut


def read_jsonl(path: Path, name: str, *, text_key: str, damage: Damage) -> Iterator[Document]:
    """Read one JSON object a line; the text is its `text_key`. A bad line costs only itself."""
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                row = f"{name}:{number}"
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError) as error:
                    damage.report(row, f"not JSON ({error})")
                    continue
                yield from _row(value, row, text_key, damage)
    except OSError as error:
        damage.report(name, str(error))


def read_parquet(path: Path, name: str, *, text_key: str, damage: Damage) -> Iterator[Document]:
    """Stream the `text_key` column of a parquet file, page by page even in one huge row group."""
    from pyarrow import parquet

    def rows() -> Iterator[Any]:
        with parquet.ParquetFile(path, buffer_size=PARQUET_BUFFER_BYTES, pre_buffer=False) as file:
            columns = file.schema_arrow.names
            if text_key not in columns:
                raise ValueError(f"text_key ({text_key}) must be a column: got {columns}")
            for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=[text_key]):
                yield from batch.to_pylist()

    yield from _rows(rows(), name, text_key, damage)


def read_saved_dataset(
    path: Path, name: str, *, text_key: str, damage: Damage
) -> Iterator[Document]:
    """Stream a folder written by `Dataset.save_to_disk`.

    Of a dictionary of splits `train` is read, or the only one.

    Raises:
        ValueError: several splits and none is called train; a column that is not there.
    """
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises whatever its parsers raise on damaged files
        damage.report(name, f"{type(error).__name__}: {error}")
        return
    if isinstance(dataset, datasets.DatasetDict):
        splits = sorted(dataset)
        split = "train" if "train" in splits else splits[0]
        if split != "train" and len(splits) > 1:
            raise ValueError(
                f"source ({path}) must have a train split: got {', '.join(splits)}. "
                "Name one split's folder."
            )
        dataset = dataset[split]
    if text_key not in dataset.column_names:
        raise ValueError(
            f"text_key ({text_key}) must be a column of {path}: "
            f"got {', '.join(dataset.column_names)}. Set text_key."
        )
    stream = iter(dataset.select_columns([text_key]).to_iterable_dataset())
    yield from _rows(stream, name, text_key, damage)


def _rows(rows: Iterator[Any], name: str, text_key: str, damage: Damage) -> Iterator[Document]:
    number = 0
    while True:
        try:
            value = next(rows)
        except StopIteration:
            return
        except Exception as error:  # as above; what was read before stays
            damage.report(name, f"{type(error).__name__} after row {number}: {error}")
            return
        number += 1
        yield from _row(value, f"{name}:{number}", text_key, damage)


def _row(value: object, name: str, text_key: str, damage: Damage) -> Iterator[Document]:
    text = value.get(text_key) if isinstance(value, dict) else None
    if not isinstance(text, str):
        has = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
        damage.report(name, f"no text under {text_key!r} (has {has})")
    elif not _is_utf8(text):
        damage.report(name, "holds half a surrogate pair, which has no UTF-8 form")
    elif text:
        yield Document(name, text)


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
