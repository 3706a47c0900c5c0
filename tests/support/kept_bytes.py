"""Bytes that stay allocated after a computation, whoever holds them: autograd, closures, caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _NewStorages(TorchDispatchMode):
    """Every storage that an operation returns, without keeping it alive."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                reference = StorageWeakRef(leaf.untyped_storage())
                self.found[reference.cdata] = (reference, leaf.untyped_storage().nbytes())
        return out


def kept_bytes(work: Callable[[], object], *, besides: tuple[Tensor, ...] = ()) -> int:
    """Bytes of storages that `work` made or touched and that outlive it while its result is held.

    Storages of `besides` (parameters, inputs) do not count. What only waits for the garbage
    collector does: a reference cycle keeps memory for as long.
    """
    known = {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in besides}
    with _NewStorages() as storages:
        held = work()
    total = sum(
        size
        for address, (reference, size) in storages.found.items()
        if address not in known and not reference.expired()
    )
    del held
    return total
