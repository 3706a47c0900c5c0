"""Which experts a token visits and with what weight: scores, choice, ties.

SpikingBrain report, section 3.2, equations 16 and 17. Everything is at least float32. Experts with
equal scores (to the bit, as where a router starts at zero) come in the order of a seeded hash of
the token's position in its document, so that load starts even, and packed, separate and decoded
documents, and all layouts, choose alike.

Shape letters: B rows, T tokens, D hidden, E experts, K choices of a token.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import ModelConfig
from models.expert_config import Balance, ExpertConfig, RouterScore

_BITS = 0xFFFFFFFF
_MULTIPLIER = 0x45D9F3B
"""Of a 32-bit integer hash whose products fit int64."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What a router decided.

    `logits` and `scores` `[B, T, E]`, `experts` and `weights` `[B, T, K]` in falling order of
    preference. `kind` is what made scores of logits.
    """

    logits: Tensor
    scores: Tensor
    experts: Tensor
    weights: Tensor
    kind: RouterScore

    @property
    def shares(self) -> Tensor:
        """Scores as shares of one, `[B, T, E]`: themselves for softmax."""
        return self.scores if self.kind is RouterScore.softmax else _normalised(self.scores)


class Router(nn.Module):
    """The router `[E, D]` of one layer, with what its balancing remembers.

    `selection_bias` or `previous_load` `[E]` are kept and updated by whoever trains, once a step.
    """

    def __init__(self, config: ModelConfig, *, layer: int) -> None:
        super().__init__()
        moe = config.moe
        self._moe, self._layer = moe, layer
        self.weight = nn.Parameter(torch.full((moe.num_experts, config.hidden_size), torch.nan))
        self.selection_bias = _state(moe, Balance.bias)
        self.previous_load = _state(moe, Balance.previous_step)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[B, T, E]` of x `[B, T, D]`, which is not spiked."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(dtype), self.weight.to(dtype))

    def choose(self, logits: Tensor, positions: Tensor) -> Choice:
        """The choice of tokens at these positions `[B or 1, T]` in their documents."""
        moe = self._moe
        scores = logits.softmax(dim=-1) if moe.score is RouterScore.softmax else logits.sigmoid()
        with torch.no_grad():
            preferred = scores
            if self.selection_bias is not None:
                preferred = scores + self.selection_bias.to(scores.dtype)
            order = tie_order(
                positions, moe.num_experts, seed=moe.tie_break_seed, layer=self._layer
            )
            experts = _top_k(preferred, order, moe.top_k)
        weights = scores.gather(-1, experts)
        if moe.renormalise:
            weights = _normalised(weights)
        return Choice(logits, scores, experts, weights, moe.score)


def tie_order(positions: Tensor, num_experts: int, *, seed: int, layer: int) -> Tensor:
    """Different whole numbers for the experts of each position, `[..., T]` to `[..., T, E]`.

    Of experts with equal scores the one with the largest is taken.
    """
    digest = hashlib.sha256(f"{seed}/{layer}".encode()).digest()
    key = int.from_bytes(digest[:4], "big")
    experts = torch.arange(num_experts, device=positions.device)
    mixed = _hash((positions + key) & _BITS)[..., None] ^ _hash(experts + 1)
    return _hash(mixed) * num_experts + experts


def _hash(x: Tensor) -> Tensor:
    """Scatter int64 numbers below 2^32 over the same range."""
    x = ((x ^ (x >> 16)) * _MULTIPLIER) & _BITS
    x = ((x ^ (x >> 16)) * _MULTIPLIER) & _BITS
    return x ^ (x >> 16)


def _top_k(preferred: Tensor, order: Tensor, count: int) -> Tensor:
    """The experts `[..., count]` with the largest values `[..., E]`, ties in falling `order`."""
    chosen: list[Tensor] = []
    left = preferred
    for _ in range(count):
        is_best = left == left.amax(dim=-1, keepdim=True)
        expert = torch.where(is_best, order, -1).argmax(dim=-1, keepdim=True)
        chosen.append(expert)
        left = left.scatter(-1, expert, -torch.inf)
    return torch.cat(chosen, dim=-1)


def _normalised(x: Tensor) -> Tensor:
    """Divided by its sum over the last dim, which sigmoids far below 0 leave at 0."""
    return x / x.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)


def _state(moe: ExpertConfig, owner: Balance) -> nn.Parameter | None:
    """A frozen parameter `[E]`, where the kind of balance has it."""
    if moe.balance is not owner:
        return None
    return nn.Parameter(torch.full((moe.num_experts,), torch.nan), requires_grad=False)
