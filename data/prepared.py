"""What a prepared folder is: its manifest, its files and their checks. Reads no tokens.

train.{bin,idx}  heldout.{bin,idx}  tokenizer/  manifest.json  checked.json (what was hashed since)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.tokenizer import Tokenizer, file_sha256, load_tokenizer

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
CHECKED_FILE = "checked.json"
TOKENIZER_FOLDER = "tokenizer"
SPLITS = ("train", "heldout")


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Everything a prepared folder says about itself.

    `arguments` decide the content and are compared on a rerun. `counts[split]` holds documents,
    tokens and text_bytes; `files[name]` holds sha256 and bytes; `text_sha256` is the hash of all
    documents in order; `fingerprint` names the content, wherever the folder lies.
    """

    source: str
    arguments: dict[str, Any]
    vocab_size: int
    eos_token_id: int
    tokenizer_sha256: str
    token_dtype: str
    counts: dict[str, dict[str, int]]
    skipped_count: int
    skipped: list[str]
    text_sha256: str
    files: dict[str, dict[str, Any]]
    fingerprint: str
    format_version: int = FORMAT_VERSION

    def write(self, folder: Path) -> None:
        """Write `manifest.json`."""
        text = json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True)
        (folder / MANIFEST_FILE).write_text(text + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Read a prepared folder's manifest.

    Raises:
        ValueError: no prepared folder, a damaged manifest or a newer format.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise ValueError(
            f"data.path ({folder}) must be a prepared folder: got no {MANIFEST_FILE} there. "
            "Make one with: python -m launch.prepare source=... out=..."
        )
    try:
        values = json.loads(path.read_text())
        version = values["format_version"]
        if version == FORMAT_VERSION:
            return Manifest(**values)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} must be a manifest: {error!r}. Prepare the folder again."
        ) from None
    raise ValueError(
        f"{path}: format_version ({version}) must be {FORMAT_VERSION}. "
        "Prepare the folder again with this release."
    )


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Hash and size of every file of a folder, by name relative to it."""
    return {
        path.relative_to(folder).as_posix(): {
            "sha256": file_sha256(path),
            "bytes": path.stat().st_size,
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (MANIFEST_FILE, CHECKED_FILE)
    }


def fingerprint_of(files: dict[str, dict[str, Any]], *facts: int | str) -> str:
    """A name for the content: the hashes of all token files, and `facts` about their meaning."""
    tokens = {name: record["sha256"] for name, record in files.items() if "/" not in name}
    return hashlib.sha256(json.dumps([tokens, *facts], sort_keys=True).encode()).hexdigest()


def check_files(folder: Path, manifest: Manifest, *, hashes: bool = False) -> None:
    """Compare the folder with its manifest: sizes always, contents with `hashes`.

    Raises:
        ValueError: a file that is missing, cut short or changed.
    """
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(
                f"{path} must exist: {MANIFEST_FILE} lists it. Prepare into a new folder."
            )
        size = path.stat().st_size
        if size != record["bytes"]:
            state = "truncated" if size < record["bytes"] else "changed"
            raise ValueError(
                f"{path} ({size} bytes) must have the manifest's size: got {record['bytes']}. "
                f"The file is {state}; prepare into a new folder."
            )
        if hashes and (found := file_sha256(path)) != record["sha256"]:
            raise ValueError(
                f"{path} (sha256 {found[:12]}) must have the manifest's hash: "
                f"got {record['sha256'][:12]}. The file is damaged; prepare into a new folder."
            )


def check_contents(folder: Path, manifest: Manifest) -> None:
    """Compare all contents with the manifest, once for each state of the files on this disk.

    What was hashed is noted beside the manifest by size, time and inode, so that the next start
    reads nothing; a copied or touched folder is hashed again.

    Raises:
        ValueError: a file that is missing, cut short or changed.
    """
    check_files(folder, manifest)
    seen = {name: _state(folder / name) for name in manifest.files}
    note = folder / CHECKED_FILE
    if note.is_file() and note.read_text() == json.dumps([manifest.fingerprint, seen]):
        return
    check_files(folder, manifest, hashes=True)
    try:
        note.write_text(json.dumps([manifest.fingerprint, seen]))
    except OSError:
        logger.info("%s cannot be written: %s is hashed at every start.", note, folder)


def _state(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ino]


def open_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that a prepared folder was encoded with.

    Raises:
        ValueError: a tokenizer other than the manifest's.
    """
    manifest = read_manifest(folder)
    tokenizer = load_tokenizer(folder / TOKENIZER_FOLDER)
    if tokenizer.sha256 != manifest.tokenizer_sha256:
        raise ValueError(
            f"{tokenizer.path} (sha256 {tokenizer.sha256[:12]}) must be the tokenizer of "
            f"{folder}: got {manifest.tokenizer_sha256[:12]} in its manifest. "
            "Restore the file or prepare into a new folder."
        )
    return tokenizer
