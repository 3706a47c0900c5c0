"""Facts of devices that a planner can plan for without having one: memory, links, peak FLOP/s.

Peak FLOP/s of NVIDIA devices are those of `parallel.backend.cuda`; this processor's are measured.
What nobody has published is assumed, and every such figure says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch

from parallel.backend.cpu import CpuBackend
from parallel.backend.cuda import table_flops

GIGA = 1e9


class DeviceName(Enum):
    """A device to plan for."""

    h100 = "h100"
    h200 = "h200"
    a100 = "a100"
    c550 = "c550"
    cpu = "cpu"


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One device of a kind and what connects several of them.

    Bandwidths are bytes a second and device: of memory, to devices of its node in one direction,
    and to other nodes. `kernels` are the linear and softmax attention kernels that it gets.
    `notes` say where figures come from and which are assumed.
    """

    name: DeviceName
    memory_bytes: int
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    devices_per_node: int
    kernels: tuple[str, str]
    peak_flops: Callable[[torch.dtype], float | None]
    notes: str


_GPU_KERNELS = ("fla", "flash_attn")
_C550_FLOPS = {torch.bfloat16: 280e12, torch.float32: 36e12}


def device_facts(name: DeviceName) -> Device:
    """The facts of a device; of the processor, those of this machine."""
    if name is DeviceName.cpu:
        return _processor()
    return _DEVICES[name]


def _nvidia(product: str) -> Callable[[torch.dtype], float | None]:
    return lambda dtype: table_flops(product, dtype)


_DEVICES = {
    DeviceName.a100: Device(
        name=DeviceName.a100,
        memory_bytes=80 * 2**30,
        memory_bandwidth=2039 * GIGA,
        link_bandwidth=300 * GIGA,
        network_bandwidth=25 * GIGA,
        devices_per_node=8,
        kernels=_GPU_KERNELS,
        peak_flops=_nvidia("A100"),
        notes="A100 80GB SXM, NVIDIA data sheet; NVLink 600 GB/s both ways; one 200 Gb/s adapter "
        "a device as in DGX A100",
    ),
    DeviceName.h100: Device(
        name=DeviceName.h100,
        memory_bytes=80 * 2**30,
        memory_bandwidth=3350 * GIGA,
        link_bandwidth=450 * GIGA,
        network_bandwidth=50 * GIGA,
        devices_per_node=8,
        kernels=_GPU_KERNELS,
        peak_flops=_nvidia("H100"),
        notes="H100 SXM, NVIDIA data sheet; NVLink 900 GB/s both ways; one 400 Gb/s adapter a "
        "device as in DGX H100",
    ),
    DeviceName.h200: Device(
        name=DeviceName.h200,
        memory_bytes=139 * 2**30,
        memory_bandwidth=4800 * GIGA,
        link_bandwidth=450 * GIGA,
        network_bandwidth=50 * GIGA,
        devices_per_node=8,
        kernels=_GPU_KERNELS,
        peak_flops=_nvidia("H200"),
        notes="H200 SXM, NVIDIA data sheet; memory: what CUDA reports of its 141 GB; links and "
        "adapters as H100",
    ),
    DeviceName.c550: Device(
        name=DeviceName.c550,
        memory_bytes=64 * 2**30,
        memory_bandwidth=1800 * GIGA,
        link_bandwidth=150 * GIGA,
        network_bandwidth=25 * GIGA,
        devices_per_node=8,
        kernels=_GPU_KERNELS,
        peak_flops=_C550_FLOPS.get,
        notes="64 GB: SpikingBrain report, appendix A.7; 280 TFLOP/s in bf16: what its MFU says, "
        "and the published figure of the C500; assumed: 1.8 TB/s of memory bandwidth (C500), "
        "150 GB/s a direction by MetaXLink, one 200 Gb/s share of an adapter a device, 8 devices "
        "a node. Simulated: nothing here was run on one",
    ),
}


def _processor() -> Device:
    backend = CpuBackend()
    return Device(
        name=DeviceName.cpu,
        memory_bytes=backend.memory().total_bytes or 0,
        memory_bandwidth=20 * GIGA,
        link_bandwidth=2 * GIGA,
        network_bandwidth=1 * GIGA,
        devices_per_node=backend.num_devices(),
        kernels=("chunked", "blocked"),
        peak_flops=backend.peak_flops,
        notes="this machine: memory and matrix products measured; assumed: 20 GB/s of memory "
        "bandwidth, 2 GB/s between processes, 1 GB/s between machines",
    )
