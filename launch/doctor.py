"""`python -m launch.doctor`: what this machine is, what follows from it, and what will be slow."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.distributed.fsdp import FSDPModule

from launch.compose import command
from models.strict import STRICT
from parallel.backend.base import Backend
from parallel.backend.detect import Probe, detect
from parallel.config import BackendName

TESTED_VERSIONS: dict[str, tuple[tuple[str, ...], str]] = {
    # Distribution: release lines that the tests ran with, and what it is for.
    "torch": (("2.13",), "everything"),
    "megatron-core": (("0.16",), "indexed datasets"),
    "hydra-core": (("1.3",), "command lines"),
    "omegaconf": (("2.3",), "command lines"),
    "pydantic": (("2.",), "configs"),
    "datasets": (("5.",), "reading parquet and Hugging Face datasets"),
    "sentencepiece": (("0.2",), "tokenizers trained here"),
    "tokenizers": (("0.23",), "tokenizers of Hugging Face models"),
    "safetensors": (("0.8",), "Hugging Face checkpoints"),
    "wandb": (("0.31",), "dashboards"),
    "matplotlib": (("3.",), "reports"),
    "transformers": (("5.",), "comparisons with Hugging Face models only"),
    "flash-linear-attention": (
        ("0.6",),
        "fast linear attention on GPUs (tests: interpreter)",
    ),
    "triton": (("3.",), "GPU kernels (tests: interpreter)"),
    "flash-attn": ((), "fast softmax attention on GPUs"),
}

TESTED_DEVICES = ("cpu",)

TORCH_FEATURES: tuple[tuple[str, Callable[[], bool], str], ...] = (
    (
        "sum reduction in FSDP2",
        lambda: hasattr(FSDPModule, "set_force_sum_reduction_for_comms"),
        "training on more than one rank does not start",
    ),
    (
        "forward methods in FSDP2",
        lambda: hasattr(torch.distributed.fsdp, "register_fsdp_forward_method"),
        "evaluation inside a run does not start",
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorConfig:
    """Which back end to explain."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    backend: BackendName = BackendName.auto


@command("doctor", DoctorConfig)
def main(config: DoctorConfig) -> None:
    """Print what was detected (device, kernels, versions), why, and what will be slow.

    Marks every library as tested, untested or missing, and names what is switched off.
    """
    sys.stdout.write(report(config.backend))


def report(name: BackendName, *, probe: Probe | None = None) -> str:
    """The printed text.

    Raises:
        ValueError: a back end that this machine or this release does not have.
    """
    probe = probe or Probe.read()
    backend = detect(name, probe=probe)
    lines = ["Back end", *_indent(_backend_lines(name, probe, backend))]
    lines += ["", "Environment", *_indent(_environment_lines(backend))]
    lines += ["", "Libraries", *_indent(_library_lines())]
    lines += ["", "torch features", *_indent(_feature_lines())]
    return "\n".join(lines) + "\n"


def _backend_lines(name: BackendName, probe: Probe, backend: Backend) -> Iterator[str]:
    target = backend.triton_target or "none"
    yield (
        f"{backend.device_type}: vendor {backend.vendor}, torch device "
        f"{backend.device_type}, Triton target {target}"
    )
    yield f"because backend={name.value} and this is {probe.describe()}"
    if backend.device_type not in TESTED_DEVICES:
        yield f"untested: this release ran its tests on {', '.join(TESTED_DEVICES)} only"
    yield from backend.explain()


def _environment_lines(backend: Backend) -> Iterator[str]:
    """Only variables that we propose are looked at: an environment holds secrets."""
    for variable, value in backend.proposed_environment().items():
        found = os.environ.get(variable)
        if found is None:
            yield f"{variable} is not set; {value} is proposed"
        elif found != value:
            yield f"{variable}={found}; {value} is proposed"
        else:
            yield f"{variable}={found}, as proposed"


def _library_lines() -> Iterator[str]:
    yield _row("Python", platform.python_version(), "needs 3.11 or newer")
    for distribution, (tested, purpose) in TESTED_VERSIONS.items():
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            yield _row(distribution, "missing", f"needed for {purpose}")
            continue
        mark = "tested" if version.startswith(tested) else "untested"
        yield _row(distribution, version, f"{mark} ({purpose})")


def _feature_lines() -> Iterator[str]:
    for feature, is_there, consequence in TORCH_FEATURES:
        yield _row(feature, "yes" if is_there() else "no", "" if is_there() else consequence)


def _row(name: str, value: str, note: str) -> str:
    return f"{name:<26} {value:<14} {note}".rstrip()


def _indent(lines: Iterator[str]) -> list[str]:
    return [f"  {line}" for line in lines]


if __name__ == "__main__":
    main()
