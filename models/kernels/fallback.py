"""One warning, said once, when a chosen kernel cannot take a precision and another computes."""

from __future__ import annotations

import logging
from functools import cache

import torch

logger = logging.getLogger(__name__)


@cache
def warn_once(chosen: str, dtype: torch.dtype, instead: str) -> None:
    """Log that `chosen` has no kernel for `dtype`; later calls with the same words are silent."""
    logger.warning("%s has no %s kernel: %s computes instead.", chosen, dtype, instead)
