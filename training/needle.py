"""Needle recall: a line with a key and a value hidden in held-out text, asked for at the end.

The prompt is filler, the needle, more filler, and the needle's beginning again, up to the value;
the model should go on with the value. It is read in chunks through the decoding states, so memory
does not grow with the length where the mixers allow that. Shape letters: N samples, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from models.generation import decode_step, prefill
from models.model import Model
from models.spiking.neurons import Spikes

KEY_LETTERS = 6
VALUE_DIGITS = 5


class Encoder(Protocol):
    """The half of a tokenizer that writing a needle needs."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""


@dataclass(frozen=True, slots=True)
class Needle:
    """The three parts of a hidden line as tokens; the value is what must be recalled."""

    key: tuple[int, ...]
    value: tuple[int, ...]
    end: tuple[int, ...]

    @property
    def line(self) -> tuple[int, ...]:
        """The whole line."""
        return self.key + self.value + self.end


@dataclass(frozen=True, slots=True)
class NeedleGrid:
    """What is asked: prompts of each length (tokens) with the needle at each depth (0 to 1)."""

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    num_samples: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"needle.samples ({self.num_samples}) must be at least 1.")
        for depth in self.depths:
            if not 0.0 <= depth <= 1.0:
                raise ValueError(f"needle.depths ({depth}) must be between 0 and 1.")


@dataclass(frozen=True, slots=True)
class NeedleScore:
    """Recall at one length and depth, over `num_samples` prompts.

    `exact_match`: share whose whole value is the greedy continuation. `log_probability`: mean
    natural log probability of a value token. `rank`: mean rank of a value token among the
    vocabulary, 1 is the likeliest. `log_probability_gain`: how much likelier a value token is than
    for the same prompt with another value in its needle.
    """

    length: int
    depth: float
    num_samples: int
    exact_match: float
    log_probability: float
    log_probability_gain: float
    rank: float


def make_needle(encoder: Encoder, generator: random.Random) -> Needle:
    """Draw a key of letters and a value of digits and encode `key = value` as a line of code."""
    key = "".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=KEY_LETTERS))
    value = "".join(generator.choices("123456789", k=VALUE_DIGITS))
    return Needle(
        key=tuple(encoder.encode(f"\nsecret_{key} = ")),
        value=tuple(encoder.encode(value)),
        end=tuple(encoder.encode("\n")),
    )


def make_prompt(
    filler: Sequence[int], needle: Needle, *, hidden: Needle, length: int, depth: float
) -> list[int]:
    """Exactly `length` tokens: filler with `hidden`'s line at `depth`, then the needle's key.

    `depth` 0 is the start of the text and 1 directly before the question.

    Raises:
        ValueError: a length that the needle and its question do not fit, or too little filler.
    """
    needed = len(hidden.line) + len(needle.key)
    num_filler = length - needed
    if num_filler < 0:
        raise ValueError(
            f"needle.lengths ({length}) must hold the needle and the question: got {needed} "
            "tokens. Use a longer length."
        )
    if len(filler) < num_filler:
        raise ValueError(
            f"needle.lengths ({length}) must fit the held-out text: got {len(filler)} tokens. "
            "Use a shorter length or a larger corpus."
        )
    before = round(depth * num_filler)
    return [*filler[:before], *hidden.line, *filler[before:num_filler], *needle.key]


def needle_recall(
    model: Model,
    filler: Tensor,
    encoder: Encoder,
    grid: NeedleGrid,
    *,
    spikes: Spikes | None = None,
) -> Iterator[NeedleScore]:
    """Score every length and depth; the same samples for every model with this tokenizer.

    Args:
        model: the model, with weights.
        filler: held-out tokens `[M]`, cut anew for every sample.
        encoder: the model's tokenizer.
        grid: lengths, depths, samples, seed.
        spikes: how to spike; None is continuous.

    Raises:
        ValueError: a length that the needle or the filler does not fit.
    """
    for length in grid.lengths:
        for depth in grid.depths:
            samples = _samples(filler, encoder, length, depth, grid)
            yield _score(model, samples, length, depth, spikes)


@dataclass(frozen=True, slots=True)
class _Sample:
    """One prompt with the true needle, one with another value, and the value to recall."""

    prompt: list[int]
    control: list[int]
    value: tuple[int, ...]


def _samples(
    filler: Tensor, encoder: Encoder, length: int, depth: float, grid: NeedleGrid
) -> list[_Sample]:
    """Samples depend on (seed, length, index) only, so that depths see the same ones."""
    samples = []
    for index in range(grid.num_samples):
        generator = random.Random(f"{grid.seed}/{length}/{index}")
        needle = make_needle(encoder, generator)
        other = make_needle(encoder, generator)
        decoy = Needle(key=needle.key, value=other.value, end=needle.end)
        start = generator.randrange(max(1, filler.numel() - length))
        text = filler[start : start + length].tolist()
        prompt = make_prompt(text, needle, hidden=needle, length=length, depth=depth)
        control_length = length + len(decoy.value) - len(needle.value)
        control = make_prompt(text, needle, hidden=decoy, length=control_length, depth=depth)
        samples.append(_Sample(prompt, control, needle.value))
    return samples


def _score(
    model: Model, samples: Sequence[_Sample], length: int, depth: float, spikes: Spikes | None
) -> NeedleScore:
    exact, log_probabilities, gains, ranks = [], [], [], []
    for sample in samples:
        scores = value_scores(model, sample.prompt, sample.value, spikes)
        control = value_scores(model, sample.control, sample.value, spikes)
        exact.append(float((scores[1] == 1).all()))
        log_probabilities.append(float(scores[0].mean()))
        gains.append(float(scores[0].mean() - control[0].mean()))
        ranks.append(float(scores[1].double().mean()))
    return NeedleScore(
        length=length,
        depth=depth,
        num_samples=len(samples),
        exact_match=_mean(exact),
        log_probability=_mean(log_probabilities),
        log_probability_gain=_mean(gains),
        rank=_mean(ranks),
    )


def value_scores(
    model: Model, prompt: Sequence[int], value: Sequence[int], spikes: Spikes | None
) -> tuple[Tensor, Tensor]:
    """Log probabilities and ranks (1 is the likeliest) of the value's tokens after a prompt.

    The value is fed token by token; all ranks 1 is the same as greedy decoding it exactly.
    """
    device = next(model.parameters()).device
    tokens = torch.tensor([list(prompt)], dtype=torch.int64, device=device)
    logits, state = prefill(model, tokens, spikes=spikes)
    log_probabilities, ranks = [], []
    for index, token in enumerate(value):
        if index > 0:
            previous = torch.tensor([value[index - 1]], dtype=torch.int64, device=device)
            logits, state = decode_step(model, previous, state, spikes=spikes)
        scores = logits[0].double().log_softmax(dim=-1)
        log_probabilities.append(scores[token])
        better = scores > scores[token]
        tied_before = scores[:token] == scores[token]
        ranks.append(1 + better.sum() + tied_before.sum())
    return torch.stack(log_probabilities).cpu(), torch.stack(ranks).cpu()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
