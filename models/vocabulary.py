"""Which rows of the vocabulary a head holds, and how its losses sum over the ranks that share it.

The seam between losses and ranks: `parallel.vocabulary` has the implementation over a process
group. Losses take None for a whole vocabulary in one process.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class VocabularyShard(Protocol):
    """This rank's rows of a vocabulary that is cut over ranks.

    A head's weight may have more than `num_rows` rows. The rest is padding: its values are never
    read (they may be NaN), its logits are minus infinity and its gradients 0.
    """

    @property
    def first_row(self) -> int:
        """Token id of this rank's first row."""

    @property
    def num_rows(self) -> int:
        """True rows that this rank holds; may be 0."""

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks, equal on all of them; outside autograd, `values` unchanged."""

    def max(self, values: Tensor) -> Tensor:
        """Maximum over the ranks; as `sum`."""
