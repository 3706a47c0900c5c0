"""Expert layers the obvious way: every expert on every token, masked; losses by their definition.

The oracle of `models.mixture_of_experts`. Shares its parameters and neurons, nothing else.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from models.expert_config import Balance, RouterScore
from models.mixture_of_experts import MixtureOfExperts
from models.model import Model
from models.router import tie_order
from models.routing import Routing
from models.spiking.neurons import Spikes, encode


class DenseExperts(MixtureOfExperts):
    """Put in place of a layer by `made_dense`; keeps its losses and counts for the test."""

    losses: list[Tensor]
    counts: Tensor

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        spikes: Spikes | None = None,
        routing: Routing | None = None,
    ) -> Tensor:
        moe = self._moe
        logits = x @ self.router.weight.T
        is_softmax = moe.score is RouterScore.softmax
        scores = logits.softmax(-1) if is_softmax else 1 / (1 + (-logits).exp())
        chosen = self.chosen(scores, positions)
        weights = scores * chosen
        if moe.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        kept = chosen if routing is None else self.kept(chosen)
        x = encode(self.in_neuron, x, spikes, "")
        out = torch.zeros_like(x)
        for expert in range(moe.num_experts):
            gate, up, down = (
                p.weight[expert]
                for p in (self.experts.gate_proj, self.experts.up_proj, self.experts.down_proj)
            )
            inner = encode(self.experts.out_neuron, F.silu(x @ gate.T) * (x @ up.T), spikes, "")
            out = out + (weights * kept)[..., expert, None] * (inner @ down.T)
        if self.shared is not None:
            gate, up, down = (
                p.weight
                for p in (self.shared.gate_proj, self.shared.up_proj, self.shared.down_proj)
            )
            inner = encode(self.shared.out_neuron, F.silu(x @ gate.T) * (x @ up.T), spikes, "")
            out = out + inner @ down.T
        if routing is not None:
            shares = scores if is_softmax else scores / scores.sum(-1, keepdim=True)
            self.losses.append(self.balance_loss(shares, chosen, routing))
            z = logits.exp().sum(-1).log().square().sum() / routing.num_tokens
            self.losses.append(moe.z_loss_coefficient * z)
            self.counts = self.counts + chosen.sum((0, 1))
        return out

    @torch.no_grad()
    def chosen(self, scores: Tensor, positions: Tensor) -> Tensor:
        """`[B, T, E]` of 0 and 1; token by token."""
        moe = self._moe
        order = tie_order(positions, moe.num_experts, seed=moe.tie_break_seed, layer=self.layer)
        order = order.expand(scores.shape)
        bias = [0.0] * moe.num_experts
        if self.router.selection_bias is not None:
            bias = self.router.selection_bias.tolist()
        found = torch.zeros_like(scores)
        for row in range(scores.shape[0]):
            for token in range(scores.shape[1]):
                keys = [
                    (float(scores[row, token, e]) + bias[e], int(order[row, token, e]), e)
                    for e in range(moe.num_experts)
                ]
                for _, _, expert in sorted(keys)[-moe.top_k :]:
                    found[row, token, expert] = 1.0
        return found

    @torch.no_grad()
    def kept(self, chosen: Tensor) -> Tensor:
        """Those choices of a row that come before their expert is full."""
        moe = self._moe
        if moe.capacity_factor is None:
            return chosen
        share = Fraction(str(moe.capacity_factor)) * moe.top_k * chosen.shape[1] / moe.num_experts
        return chosen * (chosen.cumsum(dim=1) <= math.ceil(share))

    def balance_loss(self, shares: Tensor, chosen: Tensor, routing: Routing) -> Tensor:
        moe = self._moe
        num_rows, num_tokens, num_experts = shares.shape
        coefficient = moe.balance_coefficient * num_experts
        if moe.balance is Balance.row:
            rows = [
                (chosen[row].sum(0) / (moe.top_k * num_tokens) * shares[row].mean(0)).sum()
                for row in range(num_rows)
            ]
            return coefficient * torch.stack(rows).sum() / routing.num_rows
        if moe.balance is Balance.previous_step:
            means = shares.sum((0, 1)) / routing.num_tokens
            return coefficient * (self.router.previous_load * means).sum()
        if moe.balance is Balance.microbatch:
            fractions = chosen.sum((0, 1)) / (moe.top_k * num_rows * num_tokens)
            loss = (fractions * shares.mean((0, 1))).sum()
            return coefficient * loss * num_rows / routing.num_rows
        return shares.new_zeros(())


def made_dense(model: Model) -> list[DenseExperts]:
    """Change a model's expert layers in place; returns them."""
    layers = []
    for block in model.blocks:
        if isinstance(block.ffn, MixtureOfExperts):
            block.ffn.__class__ = DenseExperts
            forget(block.ffn)
            layers.append(block.ffn)
    return layers


def forget(layer: DenseExperts) -> None:
    """Start a new step."""
    layer.losses = []
    layer.counts = torch.zeros(layer._moe.num_experts, dtype=torch.float64)


@torch.no_grad()
def move_states(layers: list[DenseExperts]) -> None:
    """What follows from a step, as `models.balance` defines it."""
    for layer in layers:
        moe, load = layer._moe, layer.counts / layer.counts.sum()
        if moe.balance is Balance.previous_step:
            layer.router.previous_load.copy_(load)
        if moe.balance is Balance.bias:
            mean = 1 / moe.num_experts
            for expert in range(moe.num_experts):
                if load[expert] != mean:
                    sign = 1.0 if load[expert] < mean else -1.0
                    layer.router.selection_bias[expert] += sign * moe.bias_update_rate
        forget(layer)
