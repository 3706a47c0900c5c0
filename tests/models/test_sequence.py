from __future__ import annotations

import pytest
import torch

from models.sequence import SequenceContext


def test_positions_and_boundaries_of_a_packed_batch() -> None:
    ids = torch.tensor([[7, 7, 7, 8, 8], [0, 1, 2, 2, 2]])
    sequence = SequenceContext.from_document_ids(ids)
    assert sequence.positions.tolist() == [[0, 1, 2, 0, 1], [0, 0, 0, 1, 2]]
    assert sequence.cu_seqlens.tolist() == [0, 3, 5, 6, 7, 10]
    assert sequence.cu_seqlens.dtype == torch.int32
    assert sequence.lengths == (3, 2, 1, 1, 3)
    assert sequence.max_length == 3
    assert (sequence.num_rows, sequence.num_tokens) == (2, 5)
    assert not sequence.is_one_document_per_row


def test_a_row_start_is_a_document_start_even_with_the_same_id() -> None:
    sequence = SequenceContext.from_document_ids(torch.zeros(3, 4, dtype=torch.int32))
    assert sequence.cu_seqlens.tolist() == [0, 4, 8, 12]
    assert sequence.is_one_document_per_row
    same = SequenceContext.one_document_per_row(3, 4)
    assert torch.equal(same.positions, sequence.positions)
    assert same.lengths == sequence.lengths == (4, 4, 4)


def test_one_token_rows_work() -> None:
    assert SequenceContext.one_document_per_row(2, 1).positions.tolist() == [[0], [0]]


def test_ids_that_decrease_are_refused() -> None:
    with pytest.raises(ValueError, match="must not decrease along a row"):
        SequenceContext.from_document_ids(torch.tensor([[1, 1, 0]]))
