"""A source (folder, file, saved dataset, the standard library) -> a stream of documents.

Owns which files belong to a source, their order and the choice under `max_bytes`. Documents are
read lazily and in sorted order, so that memory does not grow with the source.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.documents import (
    Damage,
    Document,
    read_jsonl,
    read_parquet,
    read_saved_dataset,
    read_text,
)

logger = logging.getLogger(__name__)

TEXT_SUFFIXES = frozenset(
    {
        ".txt", ".text", ".md", ".rst", ".tex", ".html", ".xml", ".py", ".pyi", ".ipynb", ".c",
        ".h", ".cc", ".cpp", ".cxx", ".hpp", ".cu", ".java", ".kt", ".scala", ".go", ".rs",
        ".js", ".mjs", ".jsx", ".ts", ".tsx", ".css", ".php", ".rb", ".pl", ".lua", ".r", ".jl",
        ".swift", ".cs", ".fs", ".hs", ".ml", ".clj", ".ex", ".erl", ".sh", ".bash", ".sql",
        ".toml", ".yaml", ".yml", ".ini", ".cfg", ".cmake", ".f90", ".m", ".asm", ".s", ".v",
        ".vhd",
    }
)  # fmt: skip
ROW_SUFFIXES = frozenset({".jsonl", ".parquet"})
STDLIB_LEFT_OUT = frozenset({"site-packages", "dist-packages", "__pycache__"})
"""Folders below the standard library that are not part of it."""

SINGLE_FILE_PIECES = 32
SINGLE_FILE_MIN_BYTES = 4096
"""One plain file is cut into about this many documents, so that some can be held out."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of a source: its name inside the source, its path and its size in bytes."""

    name: str
    path: Path
    size: int

    @property
    def is_rows(self) -> bool:
        """Whether the file holds many documents as rows (jsonl, parquet)."""
        return self.path.suffix.lower() in ROW_SUFFIXES


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """The documents of `root` (None: the Python standard library's sources).

    `max_bytes` takes, of plain files, a choice spread over the whole source by the hash of the
    name; of rows or of one single file, the first bytes. Plain files above `document_bytes` are
    cut at line ends.
    """

    root: Path | None
    text_key: str = "text"
    max_bytes: int | None = None
    document_bytes: int = 4 * 1024 * 1024

    def __post_init__(self) -> None:
        if self.root is not None and not self.root.exists():
            raise ValueError(
                f"source ({self.root}) must be an existing file or folder: got nothing there."
            )
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ValueError(f"max_bytes ({self.max_bytes}) must be at least 1, or null for all.")
        if self.document_bytes < 16:
            raise ValueError(f"document_bytes ({self.document_bytes}) must be at least 16.")

    @property
    def description(self) -> str:
        """What the manifest calls this source."""
        if self.root is None:
            version = ".".join(map(str, sys.version_info[:3]))
            return f"standard library of Python {version}"
        return str(self.root)

    @property
    def is_saved_dataset(self) -> bool:
        """Whether `root` was written by `save_to_disk` of the `datasets` library."""
        root = self.root
        if root is None or not root.is_dir():
            return False
        is_one = (root / "state.json").is_file() and (root / "dataset_info.json").is_file()
        return is_one or (root / "dataset_dict.json").is_file()

    def size_bytes(self) -> int:
        """Bytes on disk that `documents` will go through (parquet is compressed)."""
        if self.is_saved_dataset:
            assert self.root is not None
            size = sum(path.stat().st_size for path in self.root.rglob("*.arrow"))
        else:
            size = sum(file.size for file in self.files())
        return size if self.max_bytes is None else min(size, self.max_bytes)

    def documents(self, damage: Damage) -> Iterator[Document]:
        """Every document, in an order that depends on names only."""
        documents = self._all_documents(damage)
        return documents if self.max_bytes is None else _first_bytes(documents, self.max_bytes)

    def files(self, damage: Damage | None = None) -> Iterator[SourceFile]:
        """The files that are read, sorted; under `max_bytes` a deterministic choice of them.

        Folders that cannot be read go to `damage`, and what is left out by its ending to the log.

        Raises:
            ValueError: `max_bytes` below the smallest file.
        """
        if self.root is not None and self.root.is_file():
            yield SourceFile(self.root.name, self.root, self.root.stat().st_size)
        elif self.max_bytes is None:
            yield from self._walk(damage)
        else:
            found = list(self._walk(damage))
            if any(file.is_rows for file in found):
                yield from found
            else:
                yield from _spread(found, self.max_bytes)

    def _walk(self, damage: Damage | None) -> Iterator[SourceFile]:
        """Walk in sorted order, holding one folder's names at a time."""
        root = Path(sysconfig.get_path("stdlib")) if self.root is None else self.root
        suffixes = {".py"} if self.root is None else TEXT_SUFFIXES | ROW_SUFFIXES
        left_out = STDLIB_LEFT_OUT if self.root is None else frozenset({"__pycache__"})
        others: Counter[str] = Counter()

        def unreadable(error: OSError) -> None:
            if damage is not None:
                name = os.path.relpath(error.filename, root)
                damage.report(name, str(error.strerror))

        for folder, folders, names in os.walk(root, onerror=unreadable):
            folders[:] = sorted(f for f in folders if f not in left_out and not f.startswith("."))
            for name in sorted(names):
                path = Path(folder, name)
                if name.startswith("."):
                    continue
                if path.suffix.lower() not in suffixes:
                    others[path.suffix.lower() or "none"] += 1
                    continue
                if path.is_file() and (size := path.stat().st_size):
                    yield SourceFile(path.relative_to(root).as_posix(), path, size)
        if damage is not None and others and self.root is not None:
            kinds = ", ".join(f"{kind} {count}" for kind, count in others.most_common(8))
            logger.info("left out %d files by their ending: %s", others.total(), kinds)

    def _all_documents(self, damage: Damage) -> Iterator[Document]:
        if self.is_saved_dataset:
            assert self.root is not None
            yield from read_saved_dataset(
                self.root, self.root.name, text_key=self.text_key, damage=damage
            )
            return
        for file in self.files(damage):
            yield from self._read(file, damage)

    def _read(self, file: SourceFile, damage: Damage) -> Iterator[Document]:
        suffix = file.path.suffix.lower()
        if suffix == ".jsonl":
            return read_jsonl(file.path, file.name, text_key=self.text_key, damage=damage)
        if suffix == ".parquet":
            return read_parquet(file.path, file.name, text_key=self.text_key, damage=damage)
        limit, is_single = self.document_bytes, file.path == self.root
        if is_single:
            size = file.size if self.max_bytes is None else min(file.size, self.max_bytes)
            limit = min(limit, max(SINGLE_FILE_MIN_BYTES, size // SINGLE_FILE_PIECES))
        return read_text(
            file.path, file.name, document_bytes=limit, damage=damage, numbered=is_single
        )


def unit_hash(purpose: str, key: str) -> float:
    """A number in [0, 1) that depends only on `purpose` and `key`."""
    digest = hashlib.sha256(f"{purpose}\0{key}".encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _spread(files: list[SourceFile], max_bytes: int) -> list[SourceFile]:
    """Take files in hash order while they fit, and return them sorted as before."""
    chosen, total = set(), 0
    for file in sorted(files, key=lambda file: (unit_hash("choice", file.name), file.name)):
        if total + file.size <= max_bytes:
            chosen.add(file.name)
            total += file.size
    if files and not chosen:
        smallest = min(file.size for file in files)
        raise ValueError(
            f"max_bytes ({max_bytes}) must be at least the smallest file's size: got {smallest}."
        )
    return [file for file in files if file.name in chosen]


def _first_bytes(documents: Iterator[Document], max_bytes: int) -> Iterator[Document]:
    """The documents until `max_bytes` of text are reached, at least one."""
    total = 0
    for document in documents:
        total += len(document.text.encode())
        if total > max_bytes and total > len(document.text.encode()):
            return
        yield document
