"""Decoding from explicit mixer states: prefill in chunks, then one token at a time.

`L` keeps a matrix state of constant size, `S` a ring of one window, `F` a cache that grows, of
parallel branches each its own. Sinks run once, before the first token.

Shape letters: B batch, T tokens, n new tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.mixer import BranchState, MixerState
from models.model import Model
from models.softmax_attention import KeyValueCache
from models.spiking.neurons import Spikes

PREFILL_CHUNK_TOKENS = 2048


@dataclass(slots=True)
class DecodeState:
    """What each layer remembers of the tokens so far, and the position of the next one.

    A state handed to `extend`, `prefill` or `decode_step` is changed in place and must not be used
    again; `copy` it first to decode twice from one prompt.
    """

    mixers: list[MixerState]
    next_position: int = 0

    @classmethod
    def start(cls, model: Model) -> DecodeState:
        """The state before the first token."""
        return cls(mixers=[None] * len(model.blocks))

    def copy(self) -> DecodeState:
        """An independent state with the same content."""
        mixers = [_copy(mixer) for mixer in self.mixers]
        return DecodeState(mixers=mixers, next_position=self.next_position)

    @property
    def num_bytes(self) -> int:
        """Memory held by all layers."""
        return sum(_num_bytes(mixer) for mixer in self.mixers)


def _copy(state: MixerState) -> MixerState:
    if isinstance(state, tuple):
        return tuple(_copy_of_branch(each) for each in state)
    return _copy_of_branch(state)


def _copy_of_branch(state: BranchState) -> BranchState:
    # Matrix states are replaced, never changed in place, and can be shared.
    return state.copy() if isinstance(state, KeyValueCache) else state


def _num_bytes(state: MixerState) -> int:
    if isinstance(state, tuple):
        return sum(_num_bytes(each) for each in state)
    if isinstance(state, KeyValueCache):
        return state.num_bytes
    return 0 if state is None else state.numel() * state.element_size()


@torch.no_grad()
def extend(
    model: Model, tokens: Tensor, state: DecodeState, *, spikes: Spikes | None = None
) -> tuple[Tensor, DecodeState]:
    """Run the next tokens `[B, n]`; return final-normed hidden states `[B, n, D]` and the state."""
    assert model.embedding is not None, "only a whole model decodes"
    assert model.final_norm is not None, "only a whole model decodes"
    if state.next_position == 0 and model.sinks is not None:
        state = _begin(model, model.sinks(), spikes)
    x = model.embedding(tokens)
    mixers: list[MixerState] = []
    for block, mixer in zip(model.blocks, state.mixers, strict=True):
        x, mixer = block.extend(x, mixer, spikes, first_position=state.next_position)
        mixers.append(mixer)
    position = state.next_position + tokens.shape[1]
    return model.final_norm(x), DecodeState(mixers=mixers, next_position=position)


def _begin(model: Model, sinks: Tensor, spikes: Spikes | None) -> DecodeState:
    """The state after sinks alone, which every row starts from."""
    state = DecodeState.start(model)
    for index, block in enumerate(model.blocks):
        sinks, state.mixers[index] = block.begin(sinks, spikes)
    return state


@torch.no_grad()
def prefill(
    model: Model,
    tokens: Tensor,
    *,
    chunk_tokens: int = PREFILL_CHUNK_TOKENS,
    state: DecodeState | None = None,
    spikes: Spikes | None = None,
) -> tuple[Tensor, DecodeState]:
    """Read a prompt `[B, T]` in chunks; return logits `[B, V]` after it, and the state.

    Raises:
        ValueError: an empty prompt.
    """
    if tokens.shape[1] == 0:
        raise ValueError("tokens (0) must be at least 1: there is nothing to continue.")
    state = DecodeState.start(model) if state is None else state
    for start in range(0, tokens.shape[1], chunk_tokens):
        chunk = tokens[:, start : start + chunk_tokens]
        hidden, state = extend(model, chunk, state, spikes=spikes)
    return model.apply_head(hidden[:, -1]), state


@torch.no_grad()
def decode_step(
    model: Model, tokens: Tensor, state: DecodeState, *, spikes: Spikes | None = None
) -> tuple[Tensor, DecodeState]:
    """Read one token a row `[B]`; return logits `[B, V]` of the next, and the state."""
    hidden, state = extend(model, tokens[:, None], state, spikes=spikes)
    return model.apply_head(hidden[:, 0]), state


@torch.no_grad()
def generate(  # noqa: PLR0913 - the options of sampling
    model: Model,
    tokens: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_token_id: int | None = None,
    chunk_tokens: int = PREFILL_CHUNK_TOKENS,
    spikes: Spikes | None = None,
) -> Tensor:
    """Continue prompts `[B, T]` of equal length.

    Args:
        model: the model, with weights.
        tokens: the prompts.
        max_new_tokens: most tokens to add.
        temperature: 0 takes the likeliest token, above 0 samples.
        top_k: sample among this many likeliest tokens.
        top_p: sample among the likeliest tokens that together have this probability.
        seed: of the sampler, which is independent of the device.
        eos_token_id: a row that emits it repeats it; all rows finished ends the generation.
        chunk_tokens: tokens of the prompt read at a time.
        spikes: how to spike; None is continuous.

    Returns:
        `[B, T + n]` with n at most `max_new_tokens`.

    Raises:
        ValueError: sampling options out of range.
    """
    _check_sampling(temperature, top_k, top_p)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    finished = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    pieces = [tokens]
    logits, state = prefill(model, tokens, chunk_tokens=chunk_tokens, spikes=spikes)
    for index in range(max_new_tokens):
        chosen = choose(
            logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
        )
        if eos_token_id is not None:
            chosen = torch.where(finished, eos_token_id, chosen)
            finished |= chosen == eos_token_id
        pieces.append(chosen[:, None])
        if index + 1 == max_new_tokens or (eos_token_id is not None and bool(finished.all())):
            break
        logits, state = decode_step(model, chosen, state, spikes=spikes)
    return torch.cat(pieces, dim=1)


def choose(
    logits: Tensor,
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
) -> Tensor:
    """Pick the next token `[B]` from logits `[B, V]`; the generator is on the CPU."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    # Sampled on the CPU in float64, so that a seed means the same text on every device.
    scores, order = (logits.double().cpu() / temperature).sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        scores[:, top_k:] = float("-inf")
    probabilities = scores.softmax(dim=-1)
    if top_p is not None:
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    rank = torch.multinomial(probabilities, 1, generator=generator)
    return order.gather(1, rank).squeeze(1).to(logits.device)


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if temperature < 0:
        raise ValueError(f"temperature ({temperature}) must be at least 0 (0 is greedy).")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k ({top_k}) must be at least 1, or null for all tokens.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p ({top_p}) must be above 0 and at most 1, or null for all tokens.")
