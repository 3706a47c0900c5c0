"""The processor itself: gloo, plain torch kernels, memory of this process."""

from __future__ import annotations

import os
import platform
import time
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import psutil
import torch

from parallel.backend.base import Backend, KernelChoice, Memory

if TYPE_CHECKING:
    from models.kernels import KernelSet

_STATUS = Path("/proc/self/status")
_MATMUL_SIZE = 768
_MATMUL_REPEATS = 4
_ENOUGH_SECONDS = 0.5
_SHOWN_DTYPES = ("float32", "bfloat16", "float64")


class CpuBackend(Backend):
    """Any machine without an accelerator; also what tests and CI run on."""

    vendor: ClassVar[str] = "cpu"
    device_type: ClassVar[str] = "cpu"
    triton_target: ClassVar[str | None] = None
    collective_backend: ClassVar[str] = "gloo"

    def num_devices(self) -> int:
        """Logical processors that this process may use."""
        if hasattr(os, "sched_getaffinity"):
            return len(os.sched_getaffinity(0))
        return os.cpu_count() or 1

    def device(self, local_rank: int) -> torch.device:
        """The same device for every local rank."""
        return torch.device("cpu")

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """Measured once per dtype and thread count with a short matrix product (milliseconds)."""
        return _measured_flops(dtype, torch.get_num_threads())

    def memory(self) -> Memory:
        """Anonymous memory of this process (mapped files do not count); its peak is not known."""
        return Memory(
            used_bytes=anonymous_bytes(),
            peak_bytes=None,
            total_bytes=int(psutil.virtual_memory().total),
        )

    def reset_peak_memory(self) -> None:
        """Nothing to reset: the kernel keeps no peak of anonymous memory."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def kernel_choices(self) -> tuple[KernelChoice, ...]:
        """Plain torch; the Triton and CUDA kernels have no CPU path."""
        return (
            KernelChoice("linear attention", "chunked", "plain torch; Triton has no CPU target"),
            KernelChoice("softmax attention", "blocked", "plain torch, memory linear in length"),
        )

    def kernels(self) -> KernelSet:
        """Chunked and blocked."""
        from models.kernels import default_kernels

        return default_kernels()

    def proposed_environment(self, *, num_processes: int | None = None) -> dict[str, str]:
        """Threads shared out over local ranks, which otherwise each take every core; kept memory.

        glibc asks the system for every tensor above 32 MiB anew and each of its pages faults: a
        step of 16k tokens is half as slow again (measured, see LOG.md).
        """
        ranks = num_processes or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        proposed = {"OMP_NUM_THREADS": str(max(1, self.num_devices() // ranks))}
        if platform.libc_ver()[0] == "glibc":
            proposed |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 36)}
        return proposed

    def explain(self) -> list[str]:
        """Device, threads, memory, kernels."""
        total = self.memory().total_bytes or 0
        return [
            f"device: cpu, {self.num_devices()} processors, {torch.get_num_threads()} threads "
            f"for torch, {total / 2**30:.1f} GiB of memory",
            "collectives: gloo",
            *self.kernel_lines(),
            f"matrix products, measured: {_rates(self)}",
        ]


def _rates(backend: CpuBackend) -> str:
    rates = {name: backend.peak_flops(getattr(torch, name)) or 0.0 for name in _SHOWN_DTYPES}
    slow = " (bfloat16 is slow here)" if rates["bfloat16"] < rates["float32"] else ""
    return ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in rates.items()) + slow


def anonymous_bytes() -> int:
    """Anonymous resident bytes of this process; all resident bytes where /proc does not say."""
    if _STATUS.exists():
        for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return int(psutil.Process().memory_info().rss)


@lru_cache(maxsize=16)
def _measured_flops(dtype: torch.dtype, num_threads: int) -> float:
    """Best of a few products of square matrices; `num_threads` only keys the cache."""
    left = torch.ones(_MATMUL_SIZE, _MATMUL_SIZE, dtype=dtype)
    best = float("inf")
    for _ in range(_MATMUL_REPEATS):
        start = time.perf_counter()
        torch.mm(left, left)
        best = min(best, time.perf_counter() - start)
        if best > _ENOUGH_SECONDS:
            break
    return 2.0 * _MATMUL_SIZE**3 / best
