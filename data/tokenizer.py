"""Text <-> token ids: sentencepiece models and Hugging Face `tokenizer.json` behind one class.

Owns loading, encoding, the end-of-document token and copying a tokenizer's files. Training one is
in `data.tokenizer_training`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

JSON_FILE = "tokenizer.json"
MODEL_FILE = "tokenizer.model"
CONFIG_FILE = "tokenizer_config.json"
COMPANION_FILES = (
    CONFIG_FILE, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja",
)  # fmt: skip
USUAL_EOS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")
"""End-of-document tokens tried, in this order, when no file names one."""

META_SPACE = "▁"
"""sentencepiece's stand-in for a space (U+2581); a text that holds it is encoded around it."""


class Tokenizer(ABC):
    """What prepared data and generation need of a tokenizer.

    `sha256` is the hash of the one file that decides the ids (`sha256sum` shows the same).
    """

    vocab_size: int
    eos_token_id: int
    eos_token: str

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sha256 = file_sha256(path)

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without begin or end tokens.

        A special token that the text spells out is ordinary text.
        """

    @abstractmethod
    def encode_batch(self, texts: Sequence[str], *, num_threads: int = 1) -> list[list[int]]:
        """`encode` of many texts."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; special tokens vanish."""

    def copy_to(self, folder: Path) -> None:
        """Copy the tokenizer's files, with `tokenizer_config.json` naming the end token."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in (self.path.name, *COMPANION_FILES):
            source = self.path.with_name(name)
            target = folder / _standard_name(source)
            if source.is_file() and source.resolve() != target.resolve():
                shutil.copyfile(source, target)
        config = _read_json(folder / CONFIG_FILE)
        if _token_text(config.get("eos_token")) != self.eos_token:
            config["eos_token"] = self.eos_token
            (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


class SentencePieceTokenizer(Tokenizer):
    """A `tokenizer.model`. Models trained here round-trip any text exactly."""

    def __init__(self, path: Path, *, eos_token: str | None = None) -> None:
        super().__init__(path)
        from sentencepiece import SentencePieceProcessor

        try:
            self._model = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"tokenizer ({path}) must be a sentencepiece model: {error}") from None
        self.vocab_size = int(self._model.get_piece_size())
        named = eos_token or _named_eos(path.parent)
        if named is None and self._model.eos_id() >= 0:
            named = str(self._model.id_to_piece(self._model.eos_id()))
        found = -1 if named is None else int(self._model.piece_to_id(named))
        if named is None or found < 0 or self._model.is_unknown(found):
            raise ValueError(_no_eos(path, named))
        self.eos_token, self.eos_token_id = named, found
        meta_bytes = [f"<0x{byte:02X}>" for byte in META_SPACE.encode()]
        self._meta_ids = [int(self._model.piece_to_id(piece)) for piece in meta_bytes]
        has_bytes = all(self._model.is_byte(token) for token in self._meta_ids)
        adds_prefix = self._model.encode("a", out_type=str)[0].startswith(META_SPACE)
        self._splits_meta = has_bytes and not adds_prefix

    def encode(self, text: str) -> list[int]:  # noqa: D102
        if not self._splits_meta or META_SPACE not in text:
            return list(self._model.encode(text))
        ids: list[int] = []
        for index, part in enumerate(text.split(META_SPACE)):
            ids += [*(self._meta_ids if index else ()), *self._model.encode(part)]
        return ids

    def encode_batch(self, texts: Sequence[str], *, num_threads: int = 1) -> list[list[int]]:  # noqa: D102
        encoded: list[list[int]] = self._model.encode(list(texts), num_threads=num_threads)
        for index, text in enumerate(texts):
            if self._splits_meta and META_SPACE in text:
                encoded[index] = self.encode(text)
        return encoded

    def decode(self, ids: Iterable[int]) -> str:  # noqa: D102
        return str(self._model.decode([int(token) for token in ids]))


class JsonTokenizer(Tokenizer):
    """A Hugging Face `tokenizer.json`, read by the `tokenizers` library."""

    def __init__(self, path: Path, *, eos_token: str | None = None) -> None:
        super().__init__(path)
        from tokenizers import Tokenizer as HuggingFaceTokenizer

        try:
            self._model = HuggingFaceTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"tokenizer ({path}) must be a tokenizer.json: {error}") from None
        self._model.no_truncation()
        self._model.no_padding()
        # a document that spells out an end token must not end there
        self._model.encode_special_tokens = True
        vocabulary: dict[str, int] = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        named = eos_token or _named_eos(path.parent)
        if named is None:
            named = next((token for token in USUAL_EOS if token in vocabulary), None)
        if named is None or named not in vocabulary:
            raise ValueError(_no_eos(path, named))
        self.eos_token, self.eos_token_id = named, vocabulary[named]

    def encode(self, text: str) -> list[int]:  # noqa: D102
        return list(self._model.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str], *, num_threads: int = 1) -> list[list[int]]:  # noqa: D102
        encoded = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [item.ids for item in encoded]

    def decode(self, ids: Iterable[int]) -> str:  # noqa: D102
        return str(self._model.decode([int(token) for token in ids]))


def load_tokenizer(path: str | os.PathLike[str], *, eos_token: str | None = None) -> Tokenizer:
    """Load a tokenizer from its file, or from a folder (`tokenizer.json` before `.model`).

    Raises:
        ValueError: nothing there, a damaged file, or no end-of-document token.
    """
    given = Path(path)
    if given.is_dir():
        candidates = [given / JSON_FILE, given / MODEL_FILE]
        file = next((candidate for candidate in candidates if candidate.is_file()), None)
    else:
        file = given if given.is_file() else None
    if file is None:
        raise ValueError(
            f"tokenizer ({given}) must be a {JSON_FILE}, a {MODEL_FILE} or a folder with one: "
            "got neither."
        )
    if file.suffix == ".json":
        return JsonTokenizer(file, eos_token=eos_token)
    return SentencePieceTokenizer(file, eos_token=eos_token)


def document_tokens(tokenizer: Tokenizer, ids: Sequence[int]) -> NDArray[np.int32]:
    """One document's tokens as they are stored: its ids, then the end token."""
    tokens = np.empty(len(ids) + 1, dtype=np.int32)
    tokens[:-1] = ids
    tokens[-1] = tokenizer.eos_token_id
    return tokens


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, read in blocks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _standard_name(path: Path) -> str:
    """`tokenizer.json` or `tokenizer.model` for the main file, companions as they are."""
    if path.name in COMPANION_FILES:
        return path.name
    return JSON_FILE if path.suffix == ".json" else MODEL_FILE


def _named_eos(folder: Path) -> str | None:
    for name in (CONFIG_FILE, "special_tokens_map.json"):
        token = _token_text(_read_json(folder / name).get("eos_token"))
        if token is not None:
            return token
    return None


def _token_text(value: object) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON: {error}.") from None
    return value if isinstance(value, dict) else {}


def _no_eos(path: Path, named: str | None) -> str:
    got = "none is named" if named is None else f"{named!r} is not in its vocabulary"
    return f"tokenizer ({path}) must have an end-of-document token: {got}. Set eos_token."
