"""What `launch.bench` measures in tests: small enough to run every suite."""

from __future__ import annotations

import torch

from launch.bench_rows import Setting
from models.config import ModelConfig
from parallel.backend.cpu import CpuBackend
from tests.models.tiny import tiny_config


def setting(model: ModelConfig | None = None, dtype: torch.dtype = torch.float32) -> Setting:
    return Setting(
        backend=CpuBackend(), device=torch.device("cpu"), model=model or tiny_config(), dtype=dtype,
        short_tokens=16, long_tokens=32, prefill_tokens=24, parallel_tokens=64, recompute=False,
        repeats=1, long_repeats=1,
    )  # fmt: skip
