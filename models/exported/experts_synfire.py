"""The feed-forward layers of a Synfire model: dense, and mixture of experts.

Shape letters: B rows, T tokens, M tokens of all rows, D hidden, F inner channels, E experts, K
choices of a token.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels_synfire import widened
from .layers_synfire import spike

BITS = 0xFFFFFFFF


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: Any, inner_size: int) -> None:
        super().__init__()
        hidden, bias = config.hidden_size, config.ffn_bias
        self.spiking = config.spiking
        self.gate_proj = nn.Linear(hidden, inner_size, bias=bias)
        self.up_proj = nn.Linear(hidden, inner_size, bias=bias)
        self.down_proj = nn.Linear(inner_size, hidden, bias=bias)

    def visit(self, x: Tensor) -> Tensor:
        """Map spiked x `[..., D]` to `[..., D]`."""
        inner = F.silu(self.gate_proj(x)) * self.up_proj(x)
        out: Tensor = self.down_proj(spike(inner, self.spiking))
        return out


class DenseFeedForward(SwiGLU):
    """The layer `d`."""

    def __init__(self, config: Any) -> None:
        super().__init__(config, config.intermediate_size)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:  # noqa: ARG002
        """Map `[B, T, D]` to `[B, T, D]`, wherever tokens stand."""
        return self.visit(spike(x, self.spiking))


class Stack(nn.Module):
    """One matrix an expert, `[E, out, in]`."""

    def __init__(self, num_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_experts, out_features, in_features))


class Experts(nn.Module):
    """SwiGLUs side by side."""

    def __init__(self, config: Any, num_experts: int, inner_size: int) -> None:
        super().__init__()
        self.spiking = config.spiking
        self.gate_proj = Stack(num_experts, config.hidden_size, inner_size)
        self.up_proj = Stack(num_experts, config.hidden_size, inner_size)
        self.down_proj = Stack(num_experts, inner_size, config.hidden_size)

    def visit(self, x: Tensor, expert: int) -> Tensor:
        """Map spiked x `[m, D]`, the tokens of one expert."""
        gate, up, down = (
            stack.weight[expert] for stack in (self.gate_proj, self.up_proj, self.down_proj)
        )
        return F.linear(spike(F.silu(F.linear(x, gate)) * F.linear(x, up), self.spiking), down)


class Router(nn.Module):
    """Which experts a token visits, and with what weights; computes in at least float32.

    Experts with equal scores come in the order of a hash of the token's position, as in training.
    `selection_bias` and `previous_load` are what training keeps for its balance.
    """

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        self.options = config.moe
        num_experts = self.options["num_experts"]
        self.weight = nn.Parameter(torch.zeros(num_experts, config.hidden_size))
        self.selection_bias: nn.Parameter | None = None
        state = nn.Parameter(torch.zeros(num_experts), requires_grad=False)
        if self.options["balance"] == "bias":
            self.selection_bias = state
        if self.options["balance"] == "previous_step":
            self.previous_load = state
        digest = hashlib.sha256(f"{self.options['tie_break_seed']}/{layer}".encode()).digest()
        self.key = int.from_bytes(digest[:4], "big")

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Experts and their weights `[B, T, K]` of x `[B, T, D]`, which is not spiked."""
        wide = widened(x)
        logits = F.linear(wide, self.weight.to(wide.dtype))
        scores = logits.softmax(dim=-1) if self.options["score"] == "softmax" else logits.sigmoid()
        preferred = scores.detach()
        if self.selection_bias is not None:
            preferred = preferred + self.selection_bias.to(scores.dtype)
        chosen = []
        order = self._order(positions)
        for _ in range(self.options["top_k"]):
            is_best = preferred == preferred.amax(dim=-1, keepdim=True)
            chosen.append(torch.where(is_best, order, -1).argmax(dim=-1, keepdim=True))
            preferred = preferred.scatter(-1, chosen[-1], -torch.inf)
        experts = torch.cat(chosen, dim=-1)
        weights = scores.gather(-1, experts)
        if self.options["renormalise"]:
            total = weights.sum(dim=-1, keepdim=True)
            weights = weights / total.clamp(min=torch.finfo(total.dtype).tiny)
        return experts, weights

    def _order(self, positions: Tensor) -> Tensor:
        """Different whole numbers for the experts of each token, `[B or 1, T, E]`."""
        experts = torch.arange(self.options["num_experts"], device=positions.device)
        mixed = _hash((positions + self.key) & BITS)[..., None] ^ _hash(experts + 1)
        return _hash(mixed) * len(experts) + experts


def _hash(x: Tensor) -> Tensor:
    """Scatter int64 numbers below 2^32 over the same range."""
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & BITS
    return x ^ (x >> 16)


class MixtureOfExperts(nn.Module):
    """The layer `e`: the chosen experts by their weights, and the shared ones."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        self.spiking = config.spiking
        inner = config.moe["intermediate_size"] or config.intermediate_size
        self.router = Router(config, layer)
        self.experts = Experts(config, config.moe["num_experts"], inner)
        self.shared: SwiGLU | None = None
        if config.moe["num_shared_experts"]:
            self.shared = SwiGLU(config, config.moe["num_shared_experts"] * inner)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Map `[B, T, D]` of tokens at these positions of their rows."""
        experts, weights = (each.flatten(0, 1) for each in self.router(x, positions))
        x = spike(x, self.spiking)
        flat = x.flatten(0, 1)
        routed = torch.zeros_like(widened(flat))
        for expert in experts.unique().tolist():
            tokens, choice = (experts == expert).nonzero(as_tuple=True)
            out = widened(self.experts.visit(flat[tokens], expert))
            routed = routed.index_add(0, tokens, out * weights[tokens, choice][:, None])
        routed = routed.view(x.shape).to(x.dtype)
        return routed if self.shared is None else routed + self.shared.visit(x)


def build_feed_forward(config: Any, letter: str, layer: int) -> DenseFeedForward | MixtureOfExperts:
    """The feed-forward layer of a pattern letter."""
    return DenseFeedForward(config) if letter == "d" else MixtureOfExperts(config, layer)
