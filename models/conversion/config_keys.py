"""A config.json read key by key, so that keys which nobody read can be refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, NoReturn


class Format(Enum):
    """A folder format: which keys its config has and how its tensors are named."""

    qwen2 = "qwen2"
    qwen3 = "qwen3"
    llama = "llama"
    mistral = "mistral"
    gla_swa = "gla_swa"
    synfire = "synfire"


NOTE_KEY = "synfire"
"""Where our exports say what a format has no words for."""

HARMLESS_KEYS = frozenset({
    "architectures", "auto_map", "model_type", "transformers_version", "_name_or_path",
    "name_or_path", "_attn_implementation_autoset", "torch_dtype", "dtype", "use_cache",
    "pad_token_id", "unk_token_id", "sep_token_id", "return_dict", "output_attentions",
    "output_hidden_states", "id2label", "label2id", "num_labels", "tokenizer_class", "max_length",
    "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "attn_mode",
    "fuse_cross_entropy", "fuse_norm", "conv_size", NOTE_KEY,
})  # fmt: skip
"""Keys that change nothing that we compute."""


class ConfigKeys:
    """A mapping with a record of which keys somebody has read."""

    def __init__(self, raw: Mapping[str, Any], format: Format, prefix: str = "") -> None:
        self._raw = raw
        self._seen: set[str] = set()
        self._prefix = prefix
        self.format = format

    def take(self, name: str, default: Any = None) -> Any:
        """The value, or the default when absent or null."""
        self._seen.add(name)
        value = self._raw.get(name)
        return default if value is None else value

    def has(self, name: str) -> bool:
        """Whether the key is there, null included."""
        return name in self._raw

    def positive(self, name: str) -> int:
        """A size that must be there."""
        value = self.take(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(
                f"config.json {self._prefix}{name} ({value}) must be a whole number above 0. "
                "The folder's config is incomplete."
            )
        return value

    def only(self, name: str, allowed: tuple[Any, ...]) -> None:
        """Refuse a key that has another value than the allowed ones."""
        self._seen.add(name)
        if self.has(name) and self._raw[name] not in allowed:
            self.refuse(name, f"must be {' or '.join(str(value) for value in allowed)}")

    def refuse(self, name: str, rule: str) -> NoReturn:
        """Raise about one key."""
        raise ValueError(
            f"config.json {self._prefix}{name} ({self._raw.get(name)}) {rule}: "
            "Synfire would not honour it."
        )

    def refuse_the_rest(self) -> None:
        """Raise about keys that nobody read, except harmless ones and nulls."""
        rest = self._raw.keys() - self._seen - HARMLESS_KEYS
        unknown = sorted(name for name in rest if self._raw[name] is not None)
        if unknown:
            names = ", ".join(f"{self._prefix}{name} ({self._raw[name]})" for name in unknown)
            raise ValueError(
                f"config.json has keys that Synfire would not honour: {names}. "
                "Use a checkpoint without them."
            )
