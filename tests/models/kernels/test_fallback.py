from __future__ import annotations

import logging

import pytest
import torch

from models.kernels.fallback import warn_once


def test_a_fallback_is_named_once_a_precision(caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for dtype in (torch.float64, torch.float64, torch.float32):
            warn_once("linear='fla'", dtype, "linear='chunked'")
    assert caplog.messages == [
        f"linear='fla' has no {dtype} kernel: linear='chunked' computes instead."
        for dtype in (torch.float64, torch.float32)
    ]
