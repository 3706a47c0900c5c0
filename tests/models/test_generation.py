from __future__ import annotations

from typing import Any

import pytest
import torch

from models import generation
from models.config import NeuronKind, SpikingConfig
from models.model import Model
from models.sequence import SequenceContext
from models.spiking.neurons import Spikes
from tests.models.tiny import random_tokens, tiny_config, tiny_model
from tests.support.closeness import assert_close


def _logits(model: Model, tokens: torch.Tensor, spikes: Spikes | None = None) -> torch.Tensor:
    rows, count = tokens.shape
    logits: torch.Tensor = model(
        tokens, SequenceContext.one_document_per_row(rows, count), spikes=spikes
    )
    return logits


@pytest.mark.parametrize("spiking", [False, True], ids=["continuous", "spiking"])
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_prefill_and_steps_are_the_full_forward(chunk: int, spiking: bool) -> None:
    config = SpikingConfig(neuron=NeuronKind.adaptive if spiking else NeuronKind.off)
    spikes = Spikes(k=3.0) if spiking else None
    model, tokens = tiny_model(spiking=config), random_tokens(2, 21)
    expected = _logits(model, tokens, spikes)
    logits, state = generation.prefill(model, tokens[:, :16], chunk_tokens=chunk, spikes=spikes)
    assert_close(logits, expected[:, 15], relative=1e-10)
    for index in range(16, 21):
        logits, state = generation.decode_step(model, tokens[:, index], state, spikes=spikes)
        assert_close(logits, expected[:, index], relative=1e-10)
    assert state.next_position == 21


def test_prefill_goes_on_from_a_state() -> None:
    model, tokens = tiny_model(), random_tokens(2, 17)
    _, state = generation.prefill(model, tokens[:, :9], chunk_tokens=4)
    logits, _ = generation.prefill(model, tokens[:, 9:], chunk_tokens=5, state=state)
    assert_close(logits, _logits(model, tokens)[:, -1], relative=1e-11)


def test_a_copied_state_continues_independently() -> None:
    model, tokens = tiny_model(), random_tokens(1, 12)
    _, state = generation.prefill(model, tokens)
    other = state.copy()
    one = torch.tensor([5])
    for _ in range(6):
        _, state = generation.decode_step(model, one, state)
    logits, _ = generation.decode_step(model, torch.tensor([9]), other)
    expected = _logits(model, torch.cat([tokens, torch.tensor([[9]])], dim=1))
    assert_close(logits, expected[:, -1], relative=1e-11)


def test_the_state_of_a_linear_model_does_not_grow() -> None:
    model = tiny_model(tiny_config(mixers="[L S]*2"))
    state, sizes = generation.DecodeState.start(model), []
    assert state.num_bytes == 0
    for token in random_tokens(1, 40).unbind(dim=1):
        _, state = generation.decode_step(model, token, state)
        sizes.append(state.num_bytes)
    window = 2 * 2 * 5 * 2 * 8 * 8  # layers, keys and values, slots, heads, channels, bytes
    assert sizes[-1] == sizes[4] == 2 * 2 * 8 * 8 * 8 + window


def test_greedy_text_is_the_argmax_of_full_forwards() -> None:
    model, prompt = tiny_model(), random_tokens(2, 5)
    out = generation.generate(model, prompt, max_new_tokens=9, chunk_tokens=2)
    tokens = prompt
    for _ in range(9):
        tokens = torch.cat([tokens, _logits(model, tokens)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(out, tokens)


def test_rows_end_at_their_own_end_token_and_all_ended_stops() -> None:
    model, prompt = tiny_model(), random_tokens(2, 5)
    free = generation.generate(model, prompt, max_new_tokens=30)[:, 5:]
    eos = int(free[0, 2])
    out = generation.generate(model, prompt, max_new_tokens=30, eos_token_id=eos)[:, 5:]
    firsts = []
    for row in range(2):
        found = (free[row] == eos).nonzero()
        firsts.append(int(found[0]) if len(found) else 29)
    assert out.shape[1] == max(firsts) + 1
    for row, first in enumerate(firsts):
        kept = min(first + 1, out.shape[1])
        assert torch.equal(out[row, :kept], free[row, :kept])
        assert (out[row, first + 1 :] == eos).all()


def test_a_seed_fixes_the_sample() -> None:
    model, prompt = tiny_model(), random_tokens(1, 5)
    samples = [
        generation.generate(model, prompt, max_new_tokens=20, temperature=1.0, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])
    assert torch.equal(generation.generate(model, prompt, max_new_tokens=0), prompt)


def _frequencies(options: dict[str, Any]) -> torch.Tensor:
    probabilities = torch.tensor([0.1, 0.4, 0.05, 0.2, 0.25], dtype=torch.float64)
    logits = probabilities.log().expand(20_000, 5)
    generator = torch.Generator().manual_seed(0)
    chosen = generation.choose(
        logits,
        **({"temperature": 1.0, "top_k": None, "top_p": None} | options),
        generator=generator,
    )
    return torch.bincount(chosen, minlength=5) / 20_000


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.1, 0.4, 0.05, 0.2, 0.25]),
        ({"temperature": 0.5}, [0.01, 0.16, 0.0025, 0.04, 0.0625]),
        ({"top_k": 2}, [0, 0.4, 0, 0, 0.25]),
        ({"top_k": 9}, [0.1, 0.4, 0.05, 0.2, 0.25]),
        ({"top_p": 0.6}, [0, 0.4, 0, 0, 0.25]),
        ({"top_p": 0.7}, [0, 0.4, 0, 0.2, 0.25]),
        ({"top_p": 1e-9}, [0, 1, 0, 0, 0]),
        ({"temperature": 0}, [0, 1, 0, 0, 0]),
    ],
    ids=str,
)
def test_samples_follow_the_filtered_distribution(
    options: dict[str, Any], expected: list[float]
) -> None:
    wanted = torch.tensor(expected, dtype=torch.float64)
    # Five standard deviations of a frequency over 20,000 draws.
    assert_close(_frequencies(options), wanted / wanted.sum(), absolute=5 * 0.5 / 20_000**0.5)
    assert ((_frequencies(options) == 0) == (wanted == 0)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, r"temperature \(-0.1\)"),
        ({"top_k": 0}, r"top_k \(0\)"),
        ({"top_p": 0.0}, r"top_p \(0.0\)"),
        ({"top_p": 1.5}, r"top_p \(1.5\)"),
    ],
)
def test_impossible_sampling_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generation.generate(tiny_model(), random_tokens(1, 3), max_new_tokens=1, **options)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tokens \(0\) must be at least 1"):
        generation.prefill(tiny_model(), torch.zeros(1, 0, dtype=torch.int64))
