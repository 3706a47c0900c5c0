"""Where the ranks of one start meet: a part of the launcher's store that nobody has used before.

torchrun keeps one store over its restarts (pytorch issue 135712), and in it the addresses of
processes that are dead: ranks that start again would call those, and fail or hang.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping

# Public API, but torch exports it without saying so.
from torch.distributed import (  # type: ignore[attr-defined]
    DistStoreError,
    PrefixStore,
    Store,
    rendezvous,
)

SHARED_STORE_VARIABLE = "TORCHELASTIC_USE_AGENT_STORE"
_LOOKS, _LOOK_SECONDS = 20, 0.01


def is_store_shared(environment: Mapping[str, str]) -> bool:
    """Whether the launcher's store outlives the processes that it starts."""
    return environment.get(SHARED_STORE_VARIABLE) == str(True)


def join(rank: int, size: int) -> Store:
    """A store of the launcher's variables that ranks of earlier starts have not used."""
    store, _, _ = next(rendezvous("env://", rank, size))
    return fresh_part(store, rank=rank, size=size)


def fresh_part(store: Store, *, rank: int, size: int) -> Store:
    """Agree with the other ranks on a part of `store` that is new to all of them.

    Each rank greets rank 0 with a word that it has just drawn, and waits for the answer to that
    word. Rank 0 cannot tell a greeting from an old one, so it answers what it finds until the rank
    has said that it heard. Counts of restarts would not do: each host has its own.

    Raises:
        RuntimeError: a rank that did not come within the store's timeout.
    """
    word = secrets.token_hex(8)
    if rank == 0:
        deadline = time.monotonic() + _patience_seconds(store)
        for other in range(1, size):
            while not _is_heard(store, word, other):
                if time.monotonic() > deadline:
                    raise _is_missing(other, store)
        return PrefixStore(word, store)
    store.set(f"greeting/{rank}", word)
    try:
        name = store.get(f"answer/{word}").decode()
    except DistStoreError as error:
        raise _is_missing(0, store) from error
    store.set(f"heard/{name}/{rank}", "")
    return PrefixStore(name, store)


def _is_heard(store: Store, word: str, other: int) -> bool:
    """Answer a rank's newest greeting; whether it says before long that it heard."""
    if not _appears(store, f"greeting/{other}"):
        return False
    store.set(f"answer/{store.get(f'greeting/{other}').decode()}", word)
    return _appears(store, f"heard/{word}/{other}")


def _appears(store: Store, key: str) -> bool:
    """Whether a key is set before it is time to ask again; a wait that ends without it is loud."""
    for _ in range(_LOOKS):
        if store.check([key]):
            return True
        time.sleep(_LOOK_SECONDS)
    return False


def _is_missing(rank: int, store: Store) -> RuntimeError:
    return RuntimeError(
        f"rank {rank} must join within {_patience_seconds(store):g} s of the others: it did "
        "not. Look at its log, then run the same command again."
    )


def _patience_seconds(store: Store) -> float:
    return float(store.timeout.total_seconds())  # type: ignore[attr-defined]  # not in its stub
