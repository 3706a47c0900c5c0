"""Which back end this machine has. Detection reads one `Probe` value, which tests can hand in."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from parallel.backend.base import Backend
from parallel.backend.cpu import CpuBackend
from parallel.backend.cuda import CudaBackend
from parallel.config import BackendName

logger = logging.getLogger(__name__)

_METAX_WORDS = ("metax", "maca", "mxc")


@dataclass(frozen=True, slots=True)
class Probe:
    """What was looked at: version strings and device names, no decisions."""

    torch_version: str
    cuda_version: str | None
    hip_version: str | None
    device_names: tuple[str, ...]

    @classmethod
    def read(cls) -> Probe:
        """Ask torch; starts no work on a device."""
        devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return cls(
            torch_version=torch.__version__,
            cuda_version=torch.version.cuda,
            hip_version=getattr(torch.version, "hip", None),
            device_names=tuple(torch.cuda.get_device_name(index) for index in range(devices)),
        )

    @property
    def is_metax(self) -> bool:
        """Whether torch or a device speaks of MetaX (its torch presents itself as CUDA)."""
        words = " ".join((self.torch_version, *self.device_names)).lower()
        return any(word in words for word in _METAX_WORDS)

    def describe(self) -> str:
        """One clause for messages."""
        devices = ", ".join(sorted(set(self.device_names))) or "none"
        return f"torch {self.torch_version}, {len(self.device_names)} devices ({devices})"


def detect(name: BackendName = BackendName.auto, *, probe: Probe | None = None) -> Backend:
    """Return the back end of `backend=name`; `auto` takes CUDA where it works, else the CPU.

    Raises:
        ValueError: a back end that this machine or this release does not have.
    """
    probe = probe or Probe.read()
    if name is BackendName.maca or (name is not BackendName.cpu and probe.is_metax):
        raise ValueError(
            f"backend ({name.value}) must be cpu or cuda in this release: MetaX (maca) is not "
            f"supported yet, got {probe.describe()}. Use backend=cpu."
        )
    if name is BackendName.cpu:
        return CpuBackend()
    if probe.device_names and probe.hip_version is None:
        return CudaBackend()
    if name is BackendName.cuda:
        raise ValueError(
            f"backend (cuda) must find an NVIDIA device: got {probe.describe()}. "
            "Use backend=cpu or auto, or install a CUDA build of torch and check nvidia-smi."
        )
    if probe.hip_version is not None:
        logger.warning(
            "backend (auto) uses the CPU: AMD devices (HIP %s) are not supported.",
            probe.hip_version,
        )
    return CpuBackend()
