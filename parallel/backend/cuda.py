"""NVIDIA devices: NCCL (and gloo for CPU tensors), Triton and flash kernels where installed."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, ClassVar

import torch

from parallel.backend.base import Backend, KernelChoice, Memory
from parallel.backend.kernel_choice import choose

if TYPE_CHECKING:
    from models.kernels import KernelSet

_TERA = 1e12

PEAK_TFLOPS: tuple[tuple[str, dict[torch.dtype, float]], ...] = (
    # Dense figures without sparsity, from NVIDIA's data sheet of each product; float32 is the
    # figure without TF32, float64 the tensor-core one. The first name that is a whole word wins.
    ("B200", {torch.bfloat16: 2250.0, torch.float32: 75.0, torch.float64: 37.0}),
    ("H200", {torch.bfloat16: 989.4, torch.float32: 66.9, torch.float64: 66.9}),
    ("H100 PCIe", {torch.bfloat16: 756.0, torch.float32: 51.2, torch.float64: 51.2}),
    ("H100 NVL", {torch.bfloat16: 835.0, torch.float32: 60.0, torch.float64: 60.0}),
    ("H100", {torch.bfloat16: 989.4, torch.float32: 66.9, torch.float64: 66.9}),
    ("H800", {torch.bfloat16: 989.4, torch.float32: 66.9}),
    ("H20", {torch.bfloat16: 148.0, torch.float32: 44.0}),
    ("A100", {torch.bfloat16: 312.0, torch.float32: 19.5, torch.float64: 19.5}),
    ("A800", {torch.bfloat16: 312.0, torch.float32: 19.5, torch.float64: 19.5}),
    ("L40S", {torch.bfloat16: 362.0, torch.float32: 91.6}),
    ("A10", {torch.bfloat16: 125.0, torch.float32: 31.2}),
    ("L4", {torch.bfloat16: 121.0, torch.float32: 30.3}),
)

LINEAR_KERNELS = ("fla", "chunked")
SOFTMAX_KERNELS = ("flash_attn", "flex", "blocked")
"""Fastest first."""


class CudaBackend(Backend):
    """Devices that torch drives through CUDA."""

    vendor: ClassVar[str] = "nvidia"
    device_type: ClassVar[str] = "cuda"
    triton_target: ClassVar[str | None] = "cuda"
    collective_backend: ClassVar[str] = "cpu:gloo,cuda:nccl"

    def num_devices(self) -> int:
        """Visible devices."""
        return torch.cuda.device_count()

    def device(self, local_rank: int) -> torch.device:
        """Device number `local_rank`, made current."""
        if local_rank >= self.num_devices():
            raise ValueError(
                f"LOCAL_RANK ({local_rank}) must be below the number of visible CUDA devices: got "
                f"{self.num_devices()}. Start fewer processes a machine (--nproc-per-node) or "
                "widen CUDA_VISIBLE_DEVICES."
            )
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """From the table, by device name."""
        return table_flops(torch.cuda.get_device_name(), dtype)

    def memory(self) -> Memory:
        """Of torch's allocator, and the size of the device."""
        device = torch.cuda.current_device()
        return Memory(
            used_bytes=torch.cuda.memory_allocated(device),
            peak_bytes=torch.cuda.max_memory_allocated(device),
            total_bytes=torch.cuda.get_device_properties(device).total_memory,
        )

    def reset_peak_memory(self) -> None:
        """Reset the allocator's peak."""
        torch.cuda.reset_peak_memory_stats()

    def synchronize(self) -> None:
        """Wait for every stream of the current device."""
        torch.cuda.synchronize()

    def kernel_choices(self) -> tuple[KernelChoice, ...]:
        """The fastest kernel of each operation whose library works here."""
        return (
            choose("linear attention", LINEAR_KERNELS),
            choose("softmax attention", SOFTMAX_KERNELS),
        )

    def kernels(self) -> KernelSet:
        """The kernels of `kernel_choices`."""
        from models.kernels import kernel_set

        linear, softmax = self.kernel_choices()
        return kernel_set(linear=linear.name, softmax=softmax.name)

    def proposed_environment(self, *, num_processes: int | None = None) -> dict[str, str]:
        """Fewer allocator fragments, and one host thread per process."""
        return {
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            "OMP_NUM_THREADS": "1",
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        }

    def explain(self) -> list[str]:
        """Devices, collectives, kernels, figures that are missing."""
        names = [torch.cuda.get_device_name(index) for index in range(self.num_devices())]
        lines = [
            f"device: {len(names)} x {names[0] if names else 'none'}, CUDA {torch.version.cuda}",
            f"collectives: nccl {_nccl_version()} for tensors on devices, gloo for others",
            *self.kernel_lines(),
        ]
        if self.peak_flops(torch.bfloat16) is None:
            lines.append(f"peak FLOP/s of {names[0]} is not in the table: mfu will be null")
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            lines.append("bfloat16 is emulated on this device and slow: use precision=fp32")
        if "NCCL_P2P_DISABLE" in os.environ:
            lines.append("NCCL_P2P_DISABLE is set: devices talk through host memory, slowly")
        return lines


def _nccl_version() -> str:
    version: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return ".".join(str(part) for part in version)


def table_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Dense FLOP/s that a data sheet gives for a device, or None."""
    for name, figures in PEAK_TFLOPS:
        if re.search(rf"\b{name}\b", device_name):
            figure = figures.get(torch.bfloat16 if dtype == torch.float16 else dtype)
            return None if figure is None else figure * _TERA
    return None
