"""A run's first weights: proof that every one of them is accounted for, then loading.

Reads through one `WeightSource`; moves weights only, never optimizer state.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from models.config import ModelConfig
from parallel.boxes import Box
from training.config import InitConfig
from training.weight_source import WeightSource

logger = logging.getLogger(__name__)

IGNORED_DIFFERENCES = ("max_position_embeddings", "bos_token_id", "eos_token_id")


@dataclass(frozen=True, slots=True)
class WeightReport:
    """What became of every name: loaded, new in the model, unused from the source."""

    loaded: tuple[str, ...]
    new: tuple[str, ...]
    unused: tuple[str, ...]

    def describe(self) -> str:
        """One line for the log."""
        parts = [f"{len(self.loaded)} loaded"]
        for word, names in (("new", self.new), ("unused", self.unused)):
            parts.append(f"{len(names)} {word}" + (f" ({', '.join(names)})" if names else ""))
        return ", ".join(parts)


def match_weights(
    shapes: Mapping[str, tuple[int, ...]], source: WeightSource, config: InitConfig
) -> WeightReport:
    """Compare the model's names and shapes with the source's; loads nothing.

    Every name that is only on one side needs an explanation: a pattern of `init.new` or
    `init.unused`.

    Raises:
        ValueError: an unexplained name, or a shape mismatch with both numbers.
    """
    loaded = tuple(name for name in shapes if name in source.shapes)
    new = tuple(name for name in shapes if name not in source.shapes)
    unused = tuple(name for name in source.shapes if name not in shapes)
    for name in loaded:
        if shapes[name] != source.shapes[name]:
            raise ValueError(
                f"{name} {source.shapes[name]} of {source.path} must have the model's shape: got "
                f"{shapes[name]}. Choose the model= that the checkpoint was made for."
            )
    _explain(new, config.new, key="init.new", where="the model", absent=str(source.path))
    _explain(unused, config.unused, key="init.unused", where=str(source.path), absent="the model")
    return WeightReport(loaded, new, unused)


def load_weights(
    boxes: Mapping[str, Box],
    shapes: Mapping[str, tuple[int, ...]],
    source: WeightSource,
    config: InitConfig,
) -> WeightReport:
    """Fill this rank's boxes from the source; new parameters keep their initial values.

    Args:
        boxes: of the parameters that this rank has a part of.
        shapes: of all parameters of the model.
        source: where weights come from.
        config: which names only one side may have.

    Raises:
        ValueError: as `match_weights`.
    """
    report = match_weights(shapes, source, config)
    for name, tensor in source.read([name for name in report.loaded if name in boxes]):
        boxes[name].fill(tensor)
    return report


def warn_of_differences(model: ModelConfig, source: WeightSource) -> list[str]:
    """Name every model setting that differs from the source's and that no shape would show."""
    lines = []
    for field in dataclasses.fields(ModelConfig):
        ours, theirs = getattr(model, field.name), getattr(source.model, field.name)
        if ours != theirs and field.name not in IGNORED_DIFFERENCES:
            lines.append(f"model.{field.name} ({ours}) is {theirs} in {source.path}")
    for line in lines:
        logger.warning("%s: the loaded model will compute something else.", line)
    return lines


def check_same_tokenizer(
    checkpoint_path: str | Path, checkpoint_sha256: str | None, data_sha256: str
) -> None:
    """Refuse a checkpoint on data of other token ids; warn when nobody can tell.

    Raises:
        ValueError: both hashes.
    """
    if checkpoint_sha256 is None:
        logger.warning(
            "%s has no tokenizer: nobody can check that the data was encoded for it.",
            checkpoint_path,
        )
    elif checkpoint_sha256 != data_sha256:
        raise ValueError(
            f"tokenizer of the data (sha256 {data_sha256[:12]}) must be the checkpoint's: got "
            f"{checkpoint_sha256[:12]} in {checkpoint_path}. Prepare the data with the "
            "checkpoint's tokenizer (launch.prepare tokenizer=...), or use another checkpoint."
        )


def _explain(
    names: Sequence[str], patterns: Sequence[str], *, key: str, where: str, absent: str
) -> None:
    unexplained = [
        name for name in names if not any(fnmatchcase(name, pattern) for pattern in patterns)
    ]
    if unexplained:
        rest = f" and {len(unexplained) - 3} more" if len(unexplained) > 3 else ""
        raise ValueError(
            f"{key} ({list(patterns)}) must explain every parameter of {where} that {absent} does "
            f"not have: got {', '.join(unexplained[:3])}{rest}. Choose the model= that the "
            "checkpoint was made for, convert it (launch.convert), or add a pattern."
        )
