"""Token ids in a file to logits in a file, through any checkpoint (the contract of design 5.1)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from launch.checkpoints import OpenedModel
from models.sequence import SequenceContext
from models.spiking.neurons import Spikes

logger = logging.getLogger(__name__)


@torch.no_grad()
def write_logits(
    opened: OpenedModel, tokens_path: Path, out: Path, spikes: Spikes | None
) -> tuple[int, int, int]:
    """Write float32 logits `[B, T, V]` of integer ids `[B, T]`, each row one document.

    One row's logits are in memory at a time.

    Raises:
        ValueError: a file that is not a two-dimensional integer array within the vocabulary.
    """
    vocab_size = opened.config.vocab_size
    ids = _read_ids(tokens_path, vocab_size)
    out.parent.mkdir(parents=True, exist_ok=True)
    shape = (*ids.shape, vocab_size)
    written = np.lib.format.open_memmap(out, mode="w+", dtype=np.float32, shape=shape)
    for index, row in enumerate(ids):
        tokens = torch.from_numpy(row.astype(np.int64))[None].to(opened.device)
        context = SequenceContext.one_document_per_row(1, tokens.shape[1], device=opened.device)
        logits = opened.model(tokens, context, spikes=spikes)
        written[index] = logits[0].float().cpu().numpy()
    written.flush()
    logger.info("wrote logits %s to %s", shape, out)
    return shape


def _read_ids(path: Path, vocab_size: int) -> NDArray[Any]:
    try:
        ids: NDArray[Any] = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"logits.tokens ({path}) must be an .npy file: {error}.") from error
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer) or ids.size == 0:
        raise ValueError(
            f"logits.tokens ({path}) must hold integers [B, T]: got {ids.dtype} {ids.shape}."
        )
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(
            f"logits.tokens ({path}) must be ids from 0 to {vocab_size - 1}: got {ids.min()} to "
            f"{ids.max()}. Encode with this checkpoint's tokenizer."
        )
    return ids
