"""`python -m launch.environment key=value ...`: what a launcher script sets for its ranks.

Owns the choice of variables, printed as lines for a shell. Starts nothing; the backend proposes.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from launch.compose import command
from launch.model_source import model_from_checkpoint
from parallel.backend.cpu import CpuBackend
from parallel.backend.detect import detect
from training.config import RunConfig

TORCHRUN = {
    # torchrun names lines by role and local rank.
    "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "rank ${rank}: ",
    # Seconds that ranks have to save when torchrun itself is asked to stop: its own 30 are too few.
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600",
    # Restarted ranks would share the store of the dead ones, and connect to addresses of theirs.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}


def launcher_environment(config: RunConfig, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables for the ranks of one machine that `environment` does not have yet.

    Raises:
        ValueError: NPROC_PER_NODE is not a number of processes, or the backend is not there.
    """
    backend = detect(config.backend)
    num_devices = 1 if isinstance(backend, CpuBackend) else backend.num_devices()
    given = environment.get("NPROC_PER_NODE", str(num_devices))
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(
            f"NPROC_PER_NODE ({given}) must be a number of processes, 1 or more. Leave it unset "
            f"for {num_devices}, one a device."
        )
    wanted = {
        "NPROC_PER_NODE": given,
        "LOG_DIR": str(Path(config.run_dir) / "logs"),
        **TORCHRUN,
        **backend.proposed_environment(num_processes=int(given)),
    }
    return {name: value for name, value in wanted.items() if name not in environment}


@command("train", RunConfig, resolve=model_from_checkpoint)
def main(config: RunConfig) -> None:
    """Print what launch/torchrun.sh exports, after a check of the whole command line."""
    for name, value in launcher_environment(config, os.environ).items():
        sys.stdout.write(f"export {name}={shlex.quote(value)}\n")


if __name__ == "__main__":
    main()
