"""Detection from recorded probes, kernel choice, figures; the CUDA parts that need no device."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import mmap
import platform
import re

import pytest
import torch

from models.kernels import kernel_set
from parallel.backend.base import Memory
from parallel.backend.cpu import CpuBackend, anonymous_bytes
from parallel.backend.cuda import (
    LINEAR_KERNELS,
    SOFTMAX_KERNELS,
    CudaBackend,
    table_flops,
)
from parallel.backend.detect import Probe, detect
from parallel.backend.kernel_choice import MODULES, choose, require
from parallel.config import BackendName

CPU = Probe("2.13.0+cpu", None, None, ())
H100 = Probe("2.11.0+cu128", "12.8", None, ("NVIDIA H100 80GB HBM3",) * 2)
AMD = Probe("2.13.0+rocm6.4", None, "6.4", ("AMD Instinct MI300X",))
METAX_TORCH = Probe("2.6.0+metax3.2", "11.6", None, ("Device 4000",))
METAX_DEVICE = Probe("2.6.0", "11.6", None, ("MetaX C550",))


@pytest.mark.parametrize(
    ("name", "probe", "vendor"),
    [
        (BackendName.auto, CPU, "cpu"),
        (BackendName.cpu, CPU, "cpu"),
        (BackendName.auto, H100, "nvidia"),
        (BackendName.cuda, H100, "nvidia"),
        (BackendName.cpu, H100, "cpu"),
        (BackendName.cpu, METAX_TORCH, "cpu"),
    ],
)
def test_detection(name: BackendName, probe: Probe, vendor: str) -> None:
    assert detect(name, probe=probe).vendor == vendor


def test_amd_falls_back_to_the_cpu_loudly(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert detect(BackendName.auto, probe=AMD).vendor == "cpu"
    assert "AMD devices (HIP 6.4) are not supported" in caplog.text


@pytest.mark.parametrize(
    ("name", "probe", "message"),
    [
        (BackendName.cuda, CPU, r"backend \(cuda\) must find an NVIDIA device: got torch 2\.13"),
        (BackendName.cuda, AMD, r"1 devices \(AMD Instinct MI300X\)"),
        (BackendName.maca, CPU, r"backend \(maca\) must be cpu or cuda in this release"),
        (BackendName.auto, METAX_TORCH, r"MetaX \(maca\) is not supported yet.*metax3\.2"),
        (BackendName.cuda, METAX_DEVICE, r"MetaX \(maca\) is not supported yet.*MetaX C550"),
    ],
)
def test_refused(name: BackendName, probe: Probe, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        detect(name, probe=probe)


def test_vendor_device_type_and_triton_target_are_three_facts() -> None:
    facts = [(b.vendor, b.device_type, b.triton_target) for b in (CpuBackend(), CudaBackend())]
    assert facts == [("cpu", "cpu", None), ("nvidia", "cuda", "cuda")]


def installed(*names: str) -> object:
    def require(kernel: str) -> None:
        if kernel not in names:
            raise ValueError(f"{kernel} is not here. Install it.")

    return require


@pytest.mark.parametrize(
    ("have", "name", "reason", "is_slow"),
    [
        (("fast", "middle"), "fast", "its library works.", False),
        (("middle",), "middle", "its library works. fast is not here. Install it.", False),
        ((), "plain", "plain torch. fast is not here. Install it. middle is not", True),
    ],
)
def test_the_first_kernel_that_works(
    have: tuple[str, ...], name: str, reason: str, is_slow: bool
) -> None:
    choice = choose("attention", ("fast", "middle", "plain"), installed(*have))
    assert (choice.name, choice.is_slow) == (name, is_slow)
    assert choice.reason.startswith(reason)


def test_every_kernel_of_the_cuda_lists_is_known() -> None:
    """By name in `models.kernels` and, above the last, with a way to ask for its library."""
    for kernels, last in ((LINEAR_KERNELS, "chunked"), (SOFTMAX_KERNELS, "blocked")):
        assert kernels[-1] == last
        for kernel in kernels[:-1]:
            assert callable(importlib.import_module(f"models.kernels.{MODULES[kernel]}").require)
    known = kernel_set(linear=LINEAR_KERNELS[-1], softmax=SOFTMAX_KERNELS[-1])
    assert known.names == CpuBackend().kernels().names
    with pytest.raises(ValueError, match=r"one of chunked, fla.*") as caught:
        kernel_set(linear="none", softmax="blocked")
    assert set(LINEAR_KERNELS) <= set(re.findall(r"\w+", str(caught.value)))


def test_a_missing_library_is_named() -> None:
    if importlib.util.find_spec("flash_attn") is not None:
        pytest.skip("flash-attn is installed")
    with pytest.raises(ValueError, match="flash-attn installed"):
        require("flash_attn")


def test_cpu_kernels_are_those_it_announces() -> None:
    backend = CpuBackend()
    names = backend.kernels().names
    linear, softmax = backend.kernel_choices()
    assert (linear.name, softmax.name) == (names["linear_attention"], names["softmax_attention"])


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756e12),
        ("NVIDIA H200", torch.float16, 989.4e12),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12),
        ("NVIDIA A100-SXM4-80GB", torch.float64, 19.5e12),
        ("NVIDIA A10", torch.bfloat16, 125e12),
        ("NVIDIA A10G", torch.bfloat16, None),
        ("NVIDIA L40", torch.bfloat16, None),
        ("NVIDIA H20", torch.float64, None),
        ("NVIDIA RTX A1000", torch.bfloat16, None),
    ],
)
def test_peak_table(device: str, dtype: torch.dtype, expected: float | None) -> None:
    assert table_flops(device, dtype) == expected


def test_cpu_peak_is_measured_once() -> None:
    backend = CpuBackend()
    first = backend.peak_flops(torch.float32)
    assert first is not None
    assert first > 1e8
    assert backend.peak_flops(torch.float32) == first


def test_memory_counts_what_this_process_allocates() -> None:
    before = anonymous_bytes()
    # A mapping of its own: a tensor may come from memory that earlier tests freed.
    held = mmap.mmap(-1, 50 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    held.write(b"x" * len(held))
    memory = CpuBackend().memory()
    assert memory.used_bytes is not None
    assert memory.used_bytes - before > 40 * 2**20
    assert memory == Memory(memory.used_bytes, None, memory.total_bytes)
    held.close()


def test_threads_are_shared_out_over_local_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuBackend, "num_devices", lambda _: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert CpuBackend().proposed_environment() == {"OMP_NUM_THREADS": "2"}
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert CpuBackend().proposed_environment() == {"OMP_NUM_THREADS": "1"}
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    assert CpuBackend().proposed_environment()["MALLOC_MMAP_MAX_"] == "0"


def test_more_processes_than_cuda_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaBackend, "num_devices", lambda _: 2)
    with pytest.raises(ValueError, match=r"LOCAL_RANK \(2\) must be below .* got 2\. Start fewer"):
        CudaBackend().device(2)


def test_explain_speaks_of_device_collectives_and_kernels() -> None:
    lines = CpuBackend().explain()
    assert lines[0].startswith("device: cpu,")
    assert "collectives: gloo" in lines
    assert any(line.startswith("linear attention: chunked") for line in lines)
    assert any("float64" in line and "GFLOP/s" in line for line in lines)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_backend_on_a_device() -> None:
    backend = detect(BackendName.cuda)
    device = backend.device(0)
    held = torch.ones(2**20, device=device)
    memory = backend.memory()
    assert memory.used_bytes is not None
    assert memory.used_bytes >= held.nbytes
    backend.reset_peak_memory()
    backend.synchronize()
    assert backend.explain()
    assert set(backend.kernels().names) == {"linear_attention", "softmax_attention"}
