"""Where a run is: plain numbers that a checkpoint's manifest carries. No tensors, no files.

There is no random generator state to save: every draw is a function of (seed, name or position).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

EMPTY_HASH = "0" * 16


@dataclass(frozen=True, slots=True)
class TrainState:
    """Progress after `step` finished optimizer steps.

    `tokens` counts the tokens of all rows so far. `sample_hash` chains the ids of all samples seen
    (design 5.5) and `sample_hash_before` is its value one step earlier, so that a resumed run can
    compute the last link again.
    """

    step: int = 0
    tokens: int = 0
    sample_hash: str = EMPTY_HASH
    sample_hash_before: str = EMPTY_HASH

    def advance(self, *, sample_ids: Iterable[object], tokens: int) -> TrainState:
        """Return the state after one more step on these samples."""
        return replace(
            self,
            step=self.step + 1,
            tokens=self.tokens + tokens,
            sample_hash=chain(self.sample_hash, sample_ids),
            sample_hash_before=self.sample_hash,
        )

    def to_manifest(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "sample_hash": self.sample_hash,
            "sample_hash_before": self.sample_hash_before,
        }

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any]) -> TrainState:
        """Read what `to_manifest` wrote.

        Raises:
            ValueError: a manifest without these fields.
        """
        missing = [name for name in cls().to_manifest() if name not in manifest]
        if missing:
            raise ValueError(
                f"manifest.json ({', '.join(sorted(manifest))}) must hold a training state to "
                f"resume from: {', '.join(missing)} missing. Start a fresh run_dir with "
                "init.checkpoint=DIR instead."
            )
        return cls(
            step=int(manifest["step"]),
            tokens=int(manifest["tokens"]),
            sample_hash=str(manifest["sample_hash"]),
            sample_hash_before=str(manifest["sample_hash_before"]),
        )


def chain(previous: str, sample_ids: Iterable[object]) -> str:
    """Hash the previous value with the ids of one step, in order."""
    digest = hashlib.sha256(previous.encode())
    for sample_id in sample_ids:
        digest.update(b"\n" + str(sample_id).encode())
    return digest.hexdigest()[:16]
