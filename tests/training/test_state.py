"""The chain of sample ids and the round trip through a manifest."""

from __future__ import annotations

import hashlib

import pytest

from training.state import EMPTY_HASH, TrainState, chain


def test_the_hash_chains_ids_in_order() -> None:
    by_hand = hashlib.sha256(EMPTY_HASH.encode() + b"\na\n7").hexdigest()[:16]
    assert chain(EMPTY_HASH, ["a", 7]) == by_hand
    assert chain(EMPTY_HASH, [7, "a"]) != by_hand
    assert chain(by_hand, ["a"]) != chain(EMPTY_HASH, ["a"])


def test_ids_cannot_run_together() -> None:
    assert chain(EMPTY_HASH, ["ab", "c"]) != chain(EMPTY_HASH, ["a", "bc"])


def test_advance_counts_and_keeps_the_link_before() -> None:
    first = TrainState().advance(sample_ids=["a"], tokens=10)
    second = first.advance(sample_ids=["b"], tokens=5)
    assert (second.step, second.tokens) == (2, 15)
    assert second.sample_hash_before == first.sample_hash
    assert second.sample_hash == chain(first.sample_hash, ["b"])


def test_the_state_survives_a_manifest() -> None:
    state = TrainState().advance(sample_ids=["a"], tokens=10)
    assert TrainState.from_manifest({**state.to_manifest(), "other": 1}) == state


def test_a_manifest_without_progress_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must hold a training state .* tokens, .* missing"):
        TrainState.from_manifest({"step": 0})
