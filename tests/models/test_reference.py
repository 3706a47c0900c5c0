"""The slow twins against closed forms that share nothing with them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models.kernels import SinkKeys
from models.reference import linear_attention, softmax_attention
from tests.models.tiny import packed
from tests.support.closeness import assert_close


def _linear_inputs(rows: int, tokens: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    q = torch.randn(rows, tokens, 4, 3, dtype=torch.float64)
    k, v = (torch.randn(rows, tokens, 2, 3, dtype=torch.float64) for _ in range(2))
    return q, k, v, -torch.rand(rows, tokens, 2, 3, dtype=torch.float64)


def test_the_recurrence_is_the_sum_over_earlier_tokens() -> None:
    q, k, v, log_decay = _linear_inputs(2, 9)
    state = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    out, final = linear_attention(
        q, k, v, log_decay, scale=0.5, sequence=None, initial_state=state, output_final_state=True
    )
    total = log_decay.cumsum(1)
    for row in range(2):
        for step in range(9):
            for head in range(4):
                group = head // 2
                expected = (q[row, step, head] * total[row, step, group].exp()) @ state[row, group]
                for past in range(step + 1):
                    decay = (total[row, step, group] - total[row, past, group]).exp()
                    weight = (q[row, step, head] * decay * k[row, past, group]).sum()
                    expected = expected + weight * v[row, past, group]
                assert_close(out[row, step, head], 0.5 * expected, relative=1e-13)
    assert final is not None
    ending = (total[:, -1:] - total).exp() * k
    expected_final = torch.einsum("btgk,btgv->bgkv", ending, v)
    expected_final = expected_final + total[:, -1].exp()[..., None] * state
    assert_close(final, expected_final, relative=1e-13)


def test_the_recurrence_restarts_with_each_document() -> None:
    q, k, v, log_decay = _linear_inputs(2, 9)
    state = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    lengths = [[4, 5], [1, 8]]
    out, final = linear_attention(
        q, k, v, log_decay, scale=0.5, sequence=packed(lengths), initial_state=state,
        output_final_state=True,
    )  # fmt: skip
    assert final is not None
    for row, (first, _) in enumerate(lengths):
        parts = [(slice(0, first), state[row : row + 1]), (slice(first, 9), None)]
        for where, initial in parts:
            inputs = [x[row : row + 1, where] for x in (q, k, v, log_decay)]
            alone, ending = linear_attention(
                *inputs, scale=0.5, sequence=None, initial_state=initial, output_final_state=True
            )
            assert_close(out[row : row + 1, where], alone, relative=1e-14)
        assert ending is not None
        assert_close(final[row], ending[0], relative=1e-14)


def test_every_document_starts_from_the_given_state_and_the_first_goes_on() -> None:
    q, k, v, log_decay = _linear_inputs(2, 9)
    start = torch.randn(2, 3, 3, dtype=torch.float64)
    state = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    lengths = [[4, 5], [1, 8]]
    for initial in (None, state):
        out, final = linear_attention(
            q, k, v, log_decay, scale=0.5, sequence=packed(lengths), initial_state=initial,
            document_state=start, output_final_state=True,
        )  # fmt: skip
        assert final is not None
        for row, (first, _) in enumerate(lengths):
            entering = start[None] if initial is None else initial[row : row + 1]
            for where, given in ((slice(0, first), entering), (slice(first, 9), start[None])):
                inputs = [x[row : row + 1, where] for x in (q, k, v, log_decay)]
                alone, ending = linear_attention(
                    *inputs, scale=0.5, sequence=None, initial_state=given, output_final_state=True
                )
                assert_close(out[row : row + 1, where], alone, relative=1e-14)
            assert ending is not None
            assert_close(final[row], ending[0], relative=1e-14)


def test_no_final_state_unless_asked() -> None:
    assert linear_attention(*_linear_inputs(1, 2), scale=1.0, sequence=None)[1] is None


@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
def test_dense_attention_is_torch_attention_under_the_same_mask(window: int | None) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 7, 4, 6, dtype=torch.float64)
    k, v = (torch.randn(2, 7, 2, 6, dtype=torch.float64) for _ in range(2))
    sequence = packed([[3, 4], [6, 1]])
    out = softmax_attention(q, k, v, scale=0.3, window=window, sequence=sequence)
    mask = torch.zeros(2, 1, 7, 7, dtype=torch.bool)
    for row, ends in enumerate(([3, 7], [6, 7])):
        start = 0
        for end in ends:
            for query in range(start, end):
                for key in range(start, query + 1):
                    mask[row, 0, query, key] = window is None or key > query - window
            start = end
    expected = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=0.3,
        enable_gqa=True,
    )  # fmt: skip
    assert_close(out, expected.transpose(1, 2), relative=1e-13)


@pytest.mark.parametrize("window", [None, 4])
def test_fewer_queries_than_keys_are_the_last_queries(window: int | None) -> None:
    q, k, v = (torch.randn(1, 9, 2, 6, dtype=torch.float64) for _ in range(3))
    whole = softmax_attention(q, k, v, scale=1.0, window=window, sequence=None)
    tail = softmax_attention(q[:, 6:], k, v, scale=1.0, window=window, sequence=None)
    assert_close(tail, whole[:, 6:], relative=1e-14)


@pytest.mark.parametrize("own_queries", [False, True])
def test_sinks_are_visible_to_all_queries_of_all_documents(own_queries: bool) -> None:
    torch.manual_seed(0)
    q, own = (torch.randn(2, 7, 4, 6, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(2, 7, 2, 6, dtype=torch.float64) for _ in range(2))
    sink_k, sink_v = (torch.randn(3, 2, 6, dtype=torch.float64) for _ in range(2))
    lengths, window = [[3, 4], [6, 1]], 2
    sinks = SinkKeys(sink_k, sink_v, own if own_queries else None)
    out = softmax_attention(
        q, k, v, scale=0.3, window=window, sequence=packed(lengths), sinks=sinks
    )
    scoring = own if own_queries else q
    for row, (first, _) in enumerate(lengths):
        for query in range(7):
            start = max(0 if query < first else first, query - window + 1)
            for head in range(4):
                group, seen = head // 2, slice(start, query + 1)
                scores = torch.cat(
                    [
                        k[row, seen, group] @ q[row, query, head],
                        sink_k[:, group] @ scoring[row, query, head],
                    ]
                )
                values = torch.cat([v[row, seen, group], sink_v[:, group]])
                expected = (0.3 * scores).softmax(0) @ values
                assert_close(out[row, query, head], expected, relative=1e-13)
