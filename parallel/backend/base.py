"""What the program may ask about a device: three names, a few figures, kernels, reasons.

One subclass a vendor. Only this folder mentions a device by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

if TYPE_CHECKING:
    from models.kernels import KernelSet


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one device; a figure that the device cannot tell is None.

    `peak_bytes` counts from the last `reset_peak_memory`.
    """

    used_bytes: int | None
    peak_bytes: int | None
    total_bytes: int | None


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """A kernel that was chosen, why, and whether a faster one is missing."""

    operation: str
    name: str
    reason: str
    is_slow: bool = False


class Backend(ABC):
    """One vendor's device. Vendor, device type and Triton target are three separate facts.

    MetaX is the example: vendor `metax`, torch device type `cuda`, Triton target `maca`.
    """

    vendor: ClassVar[str]
    device_type: ClassVar[str]
    triton_target: ClassVar[str | None]
    collective_backend: ClassVar[str]

    @abstractmethod
    def num_devices(self) -> int:
        """Devices that processes of this machine can use."""

    @abstractmethod
    def device(self, local_rank: int) -> torch.device:
        """The device of one process of this machine, made current for it.

        Raises:
            ValueError: more processes than devices.
        """

    @abstractmethod
    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """Dense matrix FLOP/s of one device in `dtype`, or None where nobody wrote it down."""

    @abstractmethod
    def memory(self) -> Memory:
        """Memory of the current device, or of this process where the device is the machine."""

    @abstractmethod
    def reset_peak_memory(self) -> None:
        """Start counting `Memory.peak_bytes` anew."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until the device has done what was asked of it."""

    @abstractmethod
    def kernel_choices(self) -> tuple[KernelChoice, ...]:
        """One entry an operation: linear attention, softmax attention."""

    @abstractmethod
    def kernels(self) -> KernelSet:
        """The kernels of `kernel_choices`."""

    @abstractmethod
    def proposed_environment(self, *, num_processes: int | None = None) -> dict[str, str]:
        """Environment variables that a launcher should set when the user has not.

        `num_processes` on this machine; None takes LOCAL_WORLD_SIZE, or one.
        """

    @abstractmethod
    def explain(self) -> list[str]:
        """Readable lines: what was found, what follows from it, what will be slow."""

    def kernel_lines(self) -> list[str]:
        """The part of `explain` that is the same for every vendor."""
        return [
            f"{choice.operation}: {choice.name}{' [slow]' if choice.is_slow else ''}"
            f" - {choice.reason}"
            for choice in self.kernel_choices()
        ]
