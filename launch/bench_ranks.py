"""New processes of this machine for `launch.bench`: a body on every rank, and what rank 0 yields.

Ranks meet at a store that this process holds, on a port that the system chose, and speak to it over
pipes: nothing is written anywhere. A rank that fails says so and waits to be ended, so that the
others do not fail in turn and hide the reason.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

# Public API, but torch exports it without saying so.
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from launch.bench_rows import Row
from parallel.process_group import end_process

Argument = TypeVar("Argument")
Body = Callable[[Argument], Iterator[Row]]

_HOST = "127.0.0.1"
_ROW, _DONE, _FAILED = "row", "done", "failed"


@dataclass(frozen=True, slots=True)
class _Rank:
    """A process and this end of its pipe."""

    process: BaseProcess
    connection: Connection


def on_ranks(body: Body[Argument], argument: Argument, num_ranks: int) -> Iterator[Row]:
    """Rows that `body(argument)` yields on rank 0 of `num_ranks` processes, as they come.

    `body` is a plain function of a module and makes the process group (`parallel.mesh.init`).

    Raises:
        RuntimeError: a rank failed, naming it and its error. No process is left in any case.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([body.__module__])
    store = TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
    ranks: list[_Rank] = []
    try:
        for rank in range(num_ranks):
            here, there = context.Pipe()
            place = _place(rank, num_ranks, store.port)
            process = context.Process(
                target=_run, args=(body, argument, place, there), name=f"rank {rank}", daemon=True
            )
            process.start()
            there.close()
            ranks.append(_Rank(process, here))
        yield from _rows(ranks)
    finally:
        for each in ranks:
            each.process.kill()
            each.process.join()
            each.connection.close()


def _place(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """What torchrun would tell the rank, its store included."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks), "MASTER_ADDR": _HOST, "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": str(True),
    }  # fmt: skip


def _rows(ranks: Sequence[_Rank]) -> Iterator[Row]:
    """Rows until every rank has said that it is done."""
    by_connection = {each.connection: each.process for each in ranks}
    while by_connection:
        for connection in wait(list(by_connection)):
            assert isinstance(connection, Connection)
            process = by_connection[connection]
            kind, value = _receive(connection, process)
            if kind == _FAILED:
                raise RuntimeError(f"{process.name} of {len(ranks)} failed: {value}")
            if kind == _DONE:
                del by_connection[connection]
            else:
                yield value


def _receive(connection: Connection, process: BaseProcess) -> tuple[str, Any]:
    try:
        message: tuple[str, Any] = connection.recv()
    except EOFError:
        process.join()
        return _FAILED, f"it died with exit status {process.exitcode}"
    return message


def _run(
    body: Body[Argument], argument: Argument, place: Mapping[str, str], connection: Connection
) -> None:
    """The whole life of one rank."""
    os.environ.update(place)
    try:
        for row in body(argument):
            if place["RANK"] == "0":
                connection.send((_ROW, row))
        connection.send((_DONE, None))
    except BaseException as error:
        text = f"{type(error).__name__}: {error}"
        if os.environ.get("SYNFIRE_TRACEBACK"):
            text += "\n" + traceback.format_exc()
        connection.send((_FAILED, text))
        connection.poll(None)
    end_process(0)
