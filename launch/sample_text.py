"""Rows of text that a conversion is calibrated, aligned and judged on.

From a prepared folder (training and held-out documents) or from one text file and the source's
tokenizer. What is judged on is never what was fitted on.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from data.loader import Batch, StageData, heldout_rows
from data.prepared import MANIFEST_FILE, read_manifest
from data.tokenizer import Tokenizer
from models.conversion.block_stream import SampleRows
from models.loss import MASKED

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SampleText:
    """Rows for statistics, rows for judging, rows for alignment (None: not asked for)."""

    calibration: SampleRows
    evaluation: SampleRows
    alignment: SampleRows | None


@dataclass(frozen=True, slots=True)
class SampleSizes:
    """Row length, and tokens for statistics (as many again for judging) and for alignment."""

    sequence_length: int
    tokens: int
    align_tokens: int

    @property
    def rows(self) -> int:
        """Rows for statistics, and again for judging."""
        return max(self.tokens // self.sequence_length, 1)

    @property
    def align_rows(self) -> int:
        """Rows for alignment."""
        return -(-self.align_tokens // self.sequence_length)

    def fitting_split(self, found: int) -> int:
        """How many of `found` rows to fit on are for statistics; the rest is for alignment."""
        if not self.align_rows:
            return min(self.rows, found)
        return min(self.rows, max(found - self.align_rows, found // 2))


def read_sample(
    path: Path, sizes: SampleSizes, *, tokenizer: Tokenizer | None, seed: int
) -> SampleText:
    """Read a prepared folder or a text file.

    Raises:
        ValueError: nothing there, too little text, or another tokenizer than the source's.
    """
    if (path / MANIFEST_FILE).is_file():
        return _from_prepared(path, sizes, tokenizer, seed)
    if not path.is_file():
        raise ValueError(
            f"text ({path}) must be a prepared folder or a text file: got neither. Make a folder "
            "with: python -m launch.prepare source=... out=... tokenizer=SOURCE"
        )
    if tokenizer is None:
        raise ValueError(
            f"text ({path}) must be a prepared folder: the source has no tokenizer.json or "
            "tokenizer.model to encode a text file with."
        )
    return _from_file(path, sizes, tokenizer)


def _from_prepared(
    path: Path, sizes: SampleSizes, tokenizer: Tokenizer | None, seed: int
) -> SampleText:
    manifest = read_manifest(path)
    if tokenizer is None:
        logger.warning("the source has no tokenizer: nobody can check that %s fits it.", path)
    elif manifest.tokenizer_sha256 != tokenizer.sha256:
        raise ValueError(
            f"text ({path}: tokenizer {manifest.tokenizer_sha256[:12]}) must be prepared with the "
            f"source's tokenizer: got {tokenizer.sha256[:12]}. Run launch.prepare with "
            f"tokenizer={tokenizer.path}."
        )

    # One permutation of the documents: its first rows for statistics, the next for alignment.
    data = StageData(
        {str(path): 1.0},
        seed=seed,
        stage="fit",
        sequence_length=sizes.sequence_length,
        rows_per_step=sizes.rows + sizes.align_rows,
    )
    fitting = _rows(data.batch(0))
    heldout = heldout_rows(path, sequence_length=sizes.sequence_length, rows=sizes.rows)
    return SampleText(
        calibration=_slice(fitting, 0, sizes.rows),
        evaluation=_rows(heldout),
        alignment=_slice(fitting, sizes.rows, None) if sizes.align_rows else None,
    )


def _slice(rows: SampleRows, start: int, stop: int | None) -> SampleRows:
    part = slice(start, stop)
    return SampleRows(rows.tokens[part], rows.labels[part], rows.document_ids[part])


def _from_file(path: Path, sizes: SampleSizes, tokenizer: Tokenizer) -> SampleText:
    """One document cut into rows: the last ones are for judging, the others for fitting."""
    ids = torch.tensor(tokenizer.encode(path.read_text(encoding="utf-8")), dtype=torch.int64)
    length = sizes.sequence_length
    found = (len(ids) - 1) // length
    if found < 2:
        raise ValueError(
            f"text ({path}: {len(ids)} tokens) must give two rows: got sequence_length {length}. "
            "Give more text, or a smaller sequence_length."
        )
    num_evaluation = min(sizes.rows, found // 2)
    first = found - num_evaluation
    if sizes.align_rows and first < 2:
        raise ValueError(
            f"text ({path}: {len(ids)} tokens) must give three rows to align on: got "
            f"sequence_length {length}. Give more text, or a smaller sequence_length."
        )
    if first < sizes.rows + sizes.align_rows or num_evaluation < sizes.rows:
        logger.warning(
            "%s has %d rows of %d tokens: fitting on %d, judging on %d.",
            path, found, length, first, num_evaluation,
        )  # fmt: skip
    inputs, labels = (
        ids[: found * length].view(-1, length),
        ids[1 : found * length + 1].view(-1, length),
    )

    rows = SampleRows(inputs, labels, torch.zeros_like(inputs))
    split = sizes.fitting_split(first)
    aligned = min(split + sizes.align_rows, first)
    return SampleText(
        calibration=_slice(rows, 0, split),
        evaluation=_slice(rows, first, None),
        alignment=_slice(rows, split, aligned) if sizes.align_rows else None,
    )


def _rows(batch: Batch) -> SampleRows:
    assert int(batch.labels.min()) >= MASKED
    return SampleRows(batch.tokens, batch.labels, batch.document_ids)
