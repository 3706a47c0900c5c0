"""What keeps experts evenly loaded: losses of the router, and how its states move.

A loss is defined on units that no layout cuts, and divided by numbers of the whole step that are
known before the first backward pass, so that microbatches, ranks and stages only add up. Every
token of a packed row is a real one, and choices count before any is dropped. With f_i the share of
expert i in the choices of a unit, P_i the mean of its scores' shares over the tokens of the unit
(softmax: the scores; sigmoid: divided by their sum) and E experts:

- `row`: E sum_i f_i P_i of each packed row, the mean over all rows of the step.
- `previous_step`: the same with f_i of the whole previous optimizer step (uniform before the
  first) and P_i over all tokens of this one: the balance of the global batch, one step late.
- `bias`: no loss. The choice, not the weight, adds a bias to the scores, which moves once a step by
  the update rate: up for experts below the mean load, down for those above.
- `microbatch`: Switch Transformer's own, over the tokens that go through the model at once, the
  mean over them by rows. The same rows cut otherwise give another loss; left out of what all
  layouts compute alike, for comparison with other frameworks.
- `none`.

The z-loss is the mean over all tokens of the squared log-sum-exp of router logits.

f_i has no gradient, so where tokens of a row are cut over ranks each one adds its own tokens' part.

Shape letters: B rows, T tokens, t tokens held here, E experts, K choices of a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.expert_config import Balance, ExpertConfig
from models.router import Choice
from models.routing import Routing


@dataclass(frozen=True, slots=True)
class RouterLosses:
    """Scalars with their coefficients, already divided; what is not asked for is zero."""

    balance: Tensor
    z: Tensor


def router_losses(
    choice: Choice,
    counts: Tensor,
    num_tokens: int,
    *,
    moe: ExpertConfig,
    routing: Routing,
    previous_load: Tensor | None,
) -> RouterLosses:
    """The losses of one layer and microbatch.

    Args:
        choice: of the tokens held here, `[B, t, ...]`.
        counts: choices of each expert in whole rows, `[B, E]`.
        num_tokens: T of whole rows.
        moe: coefficients and kind.
        routing: denominators of the step.
        previous_load: shares `[E]` of the previous step, for that kind.
    """
    zero = choice.logits.new_zeros(())
    balance = z = zero
    if moe.balance_coefficient > 0 and moe.balance not in (Balance.none, Balance.bias):
        parts = _weighted_shares(choice, counts, num_tokens, moe, routing, previous_load)
        balance = moe.balance_coefficient * moe.num_experts * parts
    if moe.z_loss_coefficient > 0:
        squares = choice.logits.logsumexp(dim=-1).square().sum()
        z = moe.z_loss_coefficient / routing.num_tokens * squares
    return RouterLosses(balance, z)


def _weighted_shares(
    choice: Choice,
    counts: Tensor,
    num_tokens: int,
    moe: ExpertConfig,
    routing: Routing,
    previous_load: Tensor | None,
) -> Tensor:
    """The mean over units of `sum_i f_i P_i`, as far as it comes from the tokens held here."""
    sums = choice.shares.sum(dim=1)
    if moe.balance is Balance.previous_step:
        assert previous_load is not None, "this kind of balance keeps it"
        return (previous_load.to(sums.dtype) * sums).sum() / routing.num_tokens
    fractions = counts.to(sums.dtype) / (moe.top_k * num_tokens)
    if moe.balance is Balance.microbatch:
        fractions = fractions.mean(dim=0)
    return (fractions * sums).sum() / num_tokens / routing.num_rows


def selection_bias_change(counts: Tensor, update_rate: float) -> Tensor:
    """What a step in which experts were chosen so many times `[E]` adds to the selection bias."""
    return update_rate * torch.sign(counts.mean() - counts)
