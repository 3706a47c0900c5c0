"""Where tokens are: positions and document boundaries of a packed batch. No ranks, no weights.

Shape letters: B batch rows, T tokens a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SequenceContext:
    """Positions and documents of a `[B, T]` batch, shared by every mixer.

    `positions` `[B, T]` int64 restart at 0 with each document. `document_ids` `[B, T]` int64 never
    decrease along a row and change exactly at document starts. `cu_seqlens` `[num_documents + 1]`
    int32 are the document starts in the flattened `B * T` tokens, then `B * T`; a row start is
    always a document start. `lengths` is the same as Python integers, so that nobody synchronises
    a device to read it.
    """

    positions: Tensor
    document_ids: Tensor
    cu_seqlens: Tensor
    lengths: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        """B."""
        return self.positions.shape[0]

    @property
    def num_tokens(self) -> int:
        """T, the row length."""
        return self.positions.shape[1]

    @property
    def is_one_document_per_row(self) -> bool:
        """Whether no row has an inner boundary (the cheap dense case)."""
        return len(self.lengths) == self.num_rows

    @property
    def max_length(self) -> int:
        """Tokens of the longest document."""
        return max(self.lengths)

    @classmethod
    def one_document_per_row(
        cls, num_rows: int, num_tokens: int, *, device: torch.device | str = "cpu"
    ) -> SequenceContext:
        """Rows that are one document each."""
        return cls.from_document_ids(
            torch.zeros(num_rows, num_tokens, dtype=torch.int64, device=device)
        )

    @classmethod
    def from_document_ids(cls, document_ids: Tensor) -> SequenceContext:
        """Build from `[B, T]` ids that change at document starts.

        Raises:
            ValueError: ids that decrease along a row.
        """
        ids = document_ids.to(torch.int64)
        rows, tokens = ids.shape
        steps = ids[:, 1:] - ids[:, :-1]
        if bool((steps < 0).any()):
            raise ValueError(
                "document_ids must not decrease along a row: number documents in order."
            )
        starts = torch.ones_like(ids, dtype=torch.bool)
        starts[:, 1:] = steps != 0
        index = torch.arange(tokens, device=ids.device).expand(rows, tokens)
        first = torch.where(starts, index, torch.zeros_like(index)).cummax(dim=1).values
        flat = torch.nonzero(starts.reshape(-1)).squeeze(1)
        end = torch.full((1,), rows * tokens, dtype=flat.dtype, device=flat.device)
        bounds = torch.cat([flat, end])
        return cls(
            positions=index - first,
            document_ids=ids,
            cu_seqlens=bounds.to(torch.int32),
            lengths=tuple((bounds[1:] - bounds[:-1]).tolist()),
        )
