"""Ranks for tests: real processes, gloo, a file to meet at, no ports and no sleeps.

A body is a plain module-level function `body(rank, world_size, *arguments)`; arguments and results
are pickled. Processes come from a forkserver with torch imported once (a fork of pytest itself
would hang after any threaded operation) and end in one place.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

PRELOADED = (
    "torch",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch._dynamo",
    "torch.distributed.device_mesh",
    "pytest",
    "training.run",
    "tests.support.distributed",
)
TIMEOUT_SECONDS = 300.0


class RankError(AssertionError):
    """One or more ranks failed; the message holds each traceback under its rank."""


def run_ranks(
    body: Callable[..., Any],
    world_size: int,
    *arguments: Any,
    tmp_path: Path,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> list[Any]:
    """Run `body` on `world_size` gloo ranks and return their results in rank order.

    The default process group is ready when `body` starts. `tmp_path` holds the rendezvous file.

    Raises:
        RankError: a rank raised, died or did not finish in time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    meeting = Path(tempfile.mkdtemp(prefix="ranks-", dir=tmp_path)) / "rendezvous"
    processes: list[BaseProcess] = []
    connections: list[Connection] = []
    for rank in range(world_size):
        receive, send = context.Pipe(duplex=False)
        process = context.Process(
            target=_run_rank,
            args=(body, rank, world_size, arguments, str(meeting), send),
            name=f"rank {rank}",
            daemon=True,
        )
        process.start()
        send.close()
        processes.append(process)
        connections.append(receive)
    try:
        outcomes = _collect(connections, timeout_seconds)
    finally:
        _end(processes)
    return _results(outcomes, processes)


def _collect(
    connections: Sequence[Connection], timeout_seconds: float
) -> list[tuple[str, Any] | None]:
    """One outcome a rank; after the first failure the others get a short time to report theirs."""
    outcomes: list[tuple[str, Any] | None] = [None] * len(connections)
    open_ranks = dict(enumerate(connections))
    while open_ranks:
        ready = wait(list(open_ranks.values()), timeout=timeout_seconds)
        if not ready:
            break
        for rank, connection in list(open_ranks.items()):
            if connection in ready:
                del open_ranks[rank]
                outcomes[rank] = _receive(connection)
        if any(outcome is not None and outcome[0] != "done" for outcome in outcomes):
            timeout_seconds = min(timeout_seconds, 5.0)
    for rank in open_ranks:
        outcomes[rank] = ("failed", f"no answer within {timeout_seconds:g} s\n")
    return outcomes


def _receive(connection: Connection) -> tuple[str, Any]:
    try:
        outcome: tuple[str, Any] = pickle.loads(connection.recv_bytes())
    except EOFError:
        return ("died", None)
    return outcome


def _end(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.join(timeout=5)
        if process.is_alive():
            process.kill()
            process.join()


def _results(
    outcomes: Sequence[tuple[str, Any] | None], processes: Sequence[BaseProcess]
) -> list[Any]:
    failures = []
    for rank, (outcome, process) in enumerate(zip(outcomes, processes, strict=True)):
        kind, value = outcome if outcome is not None else ("died", None)
        if kind == "died":
            failures.append(f"rank {rank} died with exit status {process.exitcode}")
        elif kind == "failed":
            failures.append(f"rank {rank} of {len(processes)}:\n{value}")
        elif process.exitcode != 0:
            failures.append(f"rank {rank} finished its body but left with {process.exitcode}")
    if failures:
        raise RankError("\n".join(failures))
    return [outcome[1] for outcome in outcomes if outcome is not None]


def _run_rank(
    body: Callable[..., Any],
    rank: int,
    world_size: int,
    arguments: tuple[Any, ...],
    meeting: str,
    connection: Connection,
) -> NoReturn:
    """The whole life of one rank; never returns to multiprocessing's own exit."""
    import torch
    import torch.distributed as dist

    faulthandler.enable()
    # What the preloaded modules made stays: to look through it takes a collection 0.3 s.
    gc.freeze()
    torch.set_num_threads(1)
    status = 1
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(meeting, world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=120),
        )
        answer = pickle.dumps(("done", body(rank, world_size, *arguments)))
        dist.barrier()
        dist.destroy_process_group()
        status = 0
    except BaseException:
        answer = pickle.dumps(("failed", traceback.format_exc()))
    try:
        connection.send_bytes(answer)
        connection.close()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
