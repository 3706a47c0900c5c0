"""Needle prompts token by token, scores against a model that is known."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from models.sequence import SequenceContext
from tests.models.tiny import random_tokens, tiny_config, tiny_model
from training.needle import (
    Needle,
    NeedleGrid,
    make_needle,
    make_prompt,
    needle_recall,
    value_scores,
)


class Letters:
    """A tokenizer whose tokens are the characters, a few of them."""

    alphabet = "\n_= abcdefghijklmnopqrstuvwxyz0123456789"

    def encode(self, text: str) -> list[int]:
        return [self.alphabet.index(letter) for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.alphabet[token] for token in ids)


NEEDLE = Needle(key=(1, 2), value=(3,), end=(4,))


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (0.0, [1, 2, 3, 4, 10, 11, 12, 13, 1, 2]),
        (0.5, [10, 11, 1, 2, 3, 4, 12, 13, 1, 2]),
        (1.0, [10, 11, 12, 13, 1, 2, 3, 4, 1, 2]),
    ],
)
def test_the_prompt_has_exactly_its_length_and_the_needle_at_its_depth(
    depth: float, expected: list[int]
) -> None:
    filler = [10, 11, 12, 13, 14, 15]
    assert make_prompt(filler, NEEDLE, hidden=NEEDLE, length=10, depth=depth) == expected


def test_a_length_without_room_for_the_needle_is_refused() -> None:
    with pytest.raises(ValueError, match=r"needle\.lengths \(5\) must hold .*: got 6 tokens"):
        make_prompt([10], NEEDLE, hidden=NEEDLE, length=5, depth=0.0)


def test_too_little_filler_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"needle\.lengths \(20\) must fit the held-out text: got 3"
    ):
        make_prompt([10, 11, 12], NEEDLE, hidden=NEEDLE, length=20, depth=0.0)


def test_a_needle_reads_as_a_line_of_code_and_depends_on_the_seed_only() -> None:
    letters = Letters()
    needle = make_needle(letters, random.Random("7/100/0"))
    text = letters.decode(list(needle.line))
    assert text.startswith("\nsecret_")
    assert text.endswith("\n")
    assert needle == make_needle(letters, random.Random("7/100/0"))
    assert needle != make_needle(letters, random.Random("7/100/1"))


def test_scores_equal_those_of_one_full_forward_pass() -> None:
    model = tiny_model(tiny_config(mixers="L S F L"))
    prompt, value = random_tokens(1, 23, seed=5)[0].tolist(), [7, 40, 3]
    log_probabilities, ranks = value_scores(model, prompt, value, None)
    tokens = torch.tensor([prompt + value])
    context = SequenceContext.one_document_per_row(1, tokens.shape[1])
    logits: Tensor = model(tokens, context).detach()[0, len(prompt) - 1 : -1].double()
    expected = logits.log_softmax(dim=-1)
    for index, token in enumerate(value):
        assert float(log_probabilities[index]) == pytest.approx(float(expected[index, token]))
        order = expected[index].argsort(descending=True).tolist()
        assert int(ranks[index]) == order.index(token) + 1


class CopyingModel(torch.nn.Module):
    """Predicts what followed the last earlier occurrence of the last two tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))


def copying_logits(history: list[int], vocab_size: int) -> Tensor:
    logits = torch.zeros(1, vocab_size)
    for start in range(len(history) - 3, -1, -1):
        if history[start : start + 2] == history[-2:]:
            logits[0, history[start + 2]] = 10.0
            break
    return logits


@pytest.fixture
def copying(monkeypatch: pytest.MonkeyPatch) -> CopyingModel:
    size = len(Letters.alphabet)

    def prefill(model: object, tokens: Tensor, **_: object) -> tuple[Tensor, list[int]]:
        history = tokens[0].tolist()
        return copying_logits(history, size), history

    def decode_step(
        model: object, tokens: Tensor, state: list[int], **_: object
    ) -> tuple[Tensor, list[int]]:
        state.append(int(tokens[0]))
        return copying_logits(state, size), state

    monkeypatch.setattr("training.needle.prefill", prefill)
    monkeypatch.setattr("training.needle.decode_step", decode_step)
    return CopyingModel()


def test_a_model_that_copies_recalls_and_one_that_does_not_fails(copying: CopyingModel) -> None:
    letters = Letters()
    filler = torch.tensor(letters.encode("xyz") * 200)
    grid = NeedleGrid(lengths=(60, 100), depths=(0.0, 0.5, 1.0), num_samples=6, seed=2)
    scores = list(needle_recall(copying, filler, letters, grid))  # type: ignore[arg-type]
    assert [(score.length, score.depth) for score in scores] == [
        (length, depth) for length in (60, 100) for depth in (0.0, 0.5, 1.0)
    ]
    for score in scores:
        # "= " is followed by the value's first digit; its other digits by pairs seen in it alone.
        assert score.exact_match >= 0.5
        assert score.log_probability_gain > 3
        assert score.rank < 5
    again = list(needle_recall(copying, filler, letters, grid))  # type: ignore[arg-type]
    assert again == scores


def test_an_untrained_model_gains_nothing_from_the_needle() -> None:
    model = tiny_model()
    letters = Letters()
    filler = random_tokens(4, 200, vocab_size=40).reshape(-1)
    grid = NeedleGrid(lengths=(50,), depths=(0.5,), num_samples=4, seed=1)
    (score,) = needle_recall(model, filler, letters, grid)
    assert score.exact_match == 0.0
    assert abs(score.log_probability_gain) < 0.5
    assert score.rank > 5


@pytest.mark.parametrize("depth", [-0.1, 1.1])
def test_a_depth_outside_the_text_is_refused(depth: float) -> None:
    with pytest.raises(ValueError, match=r"needle\.depths \(-?\d\.\d\) must be between 0 and 1"):
        NeedleGrid(lengths=(50,), depths=(depth,), num_samples=1, seed=0)


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"needle\.samples \(0\) must be at least 1"):
        NeedleGrid(lengths=(50,), depths=(0.0,), num_samples=0, seed=0)
