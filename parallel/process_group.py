"""Into the process group and out of the process: the one place where a process joins and ends.

Works under a launcher (torchrun's environment) and alone without one. Knows nothing about axes.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from parallel import meeting


def place_of_launcher(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """(rank, size, local rank) of the launcher's variables; alone without them.

    Raises:
        ValueError: variables that are missing or contradict each other.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = {name: environment[name] for name in names if name in environment}
    if "RANK" not in given and "WORLD_SIZE" not in given:
        return 0, 1, int(given.get("LOCAL_RANK", "0"))
    for name in ("RANK", "WORLD_SIZE"):
        if name not in given:
            raise ValueError(
                f"{name} must be set when {', '.join(given)} is: start through torchrun, which "
                "sets all of them, or unset them all for one process."
            )
    rank, size = int(given["RANK"]), int(given["WORLD_SIZE"])
    local_rank = int(given.get("LOCAL_RANK", "0"))
    for name, value in (("RANK", rank), ("LOCAL_RANK", local_rank)):
        if not 0 <= value < size:
            raise ValueError(
                f"{name} ({value}) must be from 0 to WORLD_SIZE - 1: got WORLD_SIZE {size}. "
                "Start through torchrun, or correct the launcher's variables."
            )
    return rank, size, local_rank


def join(collective_backend: str, *, rank: int, size: int, device: torch.device) -> None:
    """Make the default process group: the launcher's meeting point, or a store of our own."""
    options: dict[str, Any] = {"backend": collective_backend, "rank": rank, "world_size": size}
    if device.index is not None:
        options["device_id"] = device
    if size == 1:
        # HashStore is public API that torch exports through the compiled module only.
        dist.init_process_group(store=dist.HashStore(), **options)  # type: ignore[attr-defined]
    elif meeting.is_store_shared(os.environ):
        dist.init_process_group(store=meeting.join(rank, size), **options)
    else:
        dist.init_process_group(init_method="env://", **options)


def end_process(status: int) -> NoReturn:
    """End this process here and now: flush, exit without destructors.

    gloo threads that outlive the interpreter abort a process that has done everything right, so
    nothing runs after this.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
