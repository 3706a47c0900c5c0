"""The vocabulary cut over the tensor-parallel ranks: which rows are whose, and their reductions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_reduce, wait_tensor


def padded_vocab_size(vocab_size: int, tp: int, multiple: int) -> int:
    """Rows of the embedding and head of `tp` ranks together: whole multiples of `multiple`."""
    unit = math.lcm(multiple, tp)
    return -(-vocab_size // unit) * unit


def rows_of_rank(vocab_size: int, tp: int, multiple: int, *, rank: int) -> range:
    """Token ids whose rows `rank` of `tp` holds; the last ranks may hold fewer than others, or 0.

    Every rank's weight has `padded_vocab_size / tp` rows, these first.
    """
    per_rank = padded_vocab_size(vocab_size, tp, multiple) // tp
    return range(min(rank * per_rank, vocab_size), min((rank + 1) * per_rank, vocab_size))


@dataclass(frozen=True, slots=True)
class GroupVocabulary:
    """`models.vocabulary.VocabularyShard` over a process group."""

    first_row: int
    num_rows: int
    group: dist.ProcessGroup

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the group, equal on all its ranks."""
        return self._reduce(values, "sum")

    def max(self, values: Tensor) -> Tensor:
        """Maximum over the group; as `sum`."""
        return self._reduce(values, "max")

    def _reduce(self, values: Tensor, operation: str) -> Tensor:
        if self.group.size() == 1:
            return values.detach()
        reduced = all_reduce(values.detach(), operation, self.group)
        result: Tensor = wait_tensor(reduced)  # type: ignore[no-untyped-call]
        return result
