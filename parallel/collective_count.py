"""Bytes that collectives move, counted where torch dispatches them."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Name of the operator to the collective's name and which side is the whole tensor.
_OPERATORS = {
    "c10d._allgather_base_": ("all-gather", "output"),
    "c10d._reduce_scatter_base_": ("reduce-scatter", "input"),
    "c10d.allreduce_": ("all-reduce", "input"),
    "c10d.send": ("send", "input"),
    "_c10d_functional.all_gather_into_tensor": ("all-gather", "result"),
    "_c10d_functional.reduce_scatter_tensor": ("reduce-scatter", "input"),
    "_c10d_functional.all_reduce": ("all-reduce", "input"),
    "_c10d_functional.all_to_all_single": ("all-to-all", "input"),
}


class CollectiveCount(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch
    """Calls and bytes of each collective on tensors while it is active.

    Sizes are those of whole tensors. What ranks tell each other by `all_gather` of small tensors or
    objects is another operator and does not count.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = _OPERATORS.get(str(func.overloadpacket))
        if known is not None:
            name, side = known
            # c10d's operators take (output, input, ...) or tensors in a list.
            where = {"result": result, "output": args[0], "input": args[0]}[side]
            if side == "input" and "base" in str(func.overloadpacket):
                where = args[1]
            tensors = [leaf for leaf in tree_leaves(where) if isinstance(leaf, Tensor)]
            self.calls[name] += 1
            self.bytes[name] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result
