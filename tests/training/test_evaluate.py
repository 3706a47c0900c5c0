"""Perplexity by position against a plain loop over tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models.sequence import SequenceContext
from tests.models.tiny import random_tokens, tiny_model
from training.evaluate import Perplexity, PositionBuckets, perplexity_of, summed_losses
from training.microbatch import Rows


def batch(rows: int = 3, tokens: int = 200) -> Rows:
    """Rows whose documents start at 0, 70 and 150, with some labels masked."""
    ids = torch.zeros(rows, tokens, dtype=torch.int64)
    ids[:, 70:] = 1
    ids[1, 150:] = 2
    labels = random_tokens(rows, tokens, seed=1)
    labels[:, 69] = -100
    labels[:, -1] = -100
    return Rows(random_tokens(rows, tokens), labels, ids)


@pytest.mark.parametrize(
    ("length", "names"),
    [
        (32, ("0-31",)),
        (64, ("0-63",)),
        (65, ("0-63", "64-64")),
        (300, ("0-63", "64-127", "128-255", "256-299")),
    ],
)
def test_buckets_double_up_to_the_row_length(length: int, names: tuple[str, ...]) -> None:
    assert PositionBuckets(length, None).names == names


def test_every_figure_is_the_mean_over_its_own_tokens() -> None:
    rows = batch()
    losses = torch.rand(rows.labels.shape, generator=torch.Generator().manual_seed(2))
    buckets = PositionBuckets(200, window_tokens=30)
    sums = summed_losses(rows, lambda part: losses[find(rows, part)], buckets, microbatch_rows=2)
    found = Perplexity.from_sums(buckets, sums)
    positions = SequenceContext.from_document_ids(rows.document_ids).positions
    everything, beyond = [], []
    by_position: dict[str, list[float]] = {"0-63": [], "64-127": [], "128-199": []}
    for row in range(3):
        for token in range(200):
            if rows.labels[row, token] < 0:
                continue
            loss, position = float(losses[row, token]), int(positions[row, token])
            everything.append(loss)
            name = "0-63" if position < 64 else "64-127" if position < 128 else "128-199"
            by_position[name].append(loss)
            if position >= 30:
                beyond.append(loss)
    assert found.num_tokens == len(everything)
    assert found.loss == pytest.approx(sum(everything) / len(everything))
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.beyond_window == pytest.approx(math.exp(sum(beyond) / len(beyond)))
    for name, values in by_position.items():
        if values:
            assert found.by_position[name] == pytest.approx(math.exp(sum(values) / len(values)))
        else:
            assert name not in found.by_position


def find(rows: Rows, part: object) -> slice:
    """Which rows a microbatch holds, by its tokens."""
    tokens = part.tokens  # type: ignore[attr-defined]
    start = next(row for row in range(3) if torch.equal(rows.tokens[row], tokens[0]))
    return slice(start, start + tokens.shape[0])


def test_a_model_in_one_process_is_measured_the_same_in_any_microbatches() -> None:
    model, rows = tiny_model(), batch(tokens=90)
    found = [perplexity_of(model, rows, spikes=None, microbatch_rows=size) for size in (1, 2, 3)]
    assert found[0].perplexity == pytest.approx(found[2].perplexity, rel=1e-12)
    assert found[1].perplexity == pytest.approx(found[2].perplexity, rel=1e-12)
    context = SequenceContext.from_document_ids(rows.document_ids)
    logits: Tensor = model(rows.tokens, context).detach()
    expected = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), rows.labels.reshape(-1)
    )
    assert found[0].loss == pytest.approx(float(expected), rel=1e-12)


def test_without_a_window_or_with_short_documents_there_is_nothing_beyond() -> None:
    rows = batch(tokens=100)
    zeros = torch.zeros(rows.labels.shape)
    for window in (None, 90):
        buckets = PositionBuckets(100, window)
        sums = buckets.sums(zeros, rows.labels, rows.document_ids)
        assert Perplexity.from_sums(buckets, sums).beyond_window is None


def test_a_bucket_that_no_token_reached_is_left_out() -> None:
    rows = batch(tokens=100)
    buckets = PositionBuckets(300, None)
    sums = buckets.sums(torch.ones(rows.labels.shape), rows.labels, rows.document_ids)
    assert set(Perplexity.from_sums(buckets, sums).by_position) == {"0-63", "64-127"}


def test_a_diverged_model_has_infinite_perplexity() -> None:
    buckets = PositionBuckets(4, None)
    sums = torch.tensor([[8000.0, 0.0], [4.0, 0.0]], dtype=torch.float64)
    assert Perplexity.from_sums(buckets, sums).perplexity == math.inf


def test_rows_without_a_target_are_refused() -> None:
    buckets = PositionBuckets(4, None)
    with pytest.raises(ValueError, match=r"held-out rows \(0 tokens\) must hold at least one"):
        Perplexity.from_sums(buckets, torch.zeros(2, 2, dtype=torch.float64))
