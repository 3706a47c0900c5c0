"""The feed-forward layer `e`: a router, routed experts and shared ones.

`y = sum_shared E_s(x) + sum_chosen p_i E_i(x)` (SpikingBrain report, equation 17). The router reads
x as it is; experts read one spiking encoding of it. The router works on the residual stream, the
experts inside the tensor-parallel region, where every rank has all tokens and its own inner
channels.

Shape letters: B rows, T tokens, D hidden, E experts, K choices of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from models.attached_loss import attach
from models.balance import router_losses
from models.dispatch import Dispatch, dispatch
from models.feed_forward import SwiGLUProjections
from models.layers import Parts
from models.recompute import recomputed, unobserved
from models.router import Choice, Router
from models.routing import Routing
from models.spiking.neurons import AdaptiveThreshold, Spikes, encode


class MixtureOfExperts(nn.Module):
    """Layer `layer`'s experts. With a `Routing` it trains: losses, capacity; else neither."""

    def __init__(self, parts: Parts, *, layer: int) -> None:
        super().__init__()
        config, layers, again = parts.config, parts.layers, parts.recompute
        moe, inner = config.moe, config.expert_intermediate_size
        self.layer, self._moe, self._layers = layer, moe, layers
        # What is computed again as a whole needs no parts.
        self._layer_again = layer in again.expert_layers
        self._experts_again = layer in again.experts
        self._norms_again = layer in again.norms - again.expert_layers
        self._router_again = layer in again.activations - again.expert_layers
        activations_again = self._router_again and not self._experts_again
        self.router = Router(config, layer=layer)
        self.experts = layers.experts(
            moe.num_experts,
            config.hidden_size,
            inner,
            neuron=parts.build_neuron(layers.cut_channels),
            layer=layer,
            activations_again=activations_again,
        )
        self.shared: SwiGLUProjections | None = None
        if moe.num_shared_experts:
            # Side by side, which is their sum.
            self.shared = SwiGLUProjections(
                parts,
                layer=layer,
                inner_size=moe.num_shared_experts * inner,
                activations_again=activations_again,
                inner_again=self._experts_again,
            )
        self.in_neuron = parts.build_neuron(layers.whole_channels)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        spikes: Spikes | None = None,
        routing: Routing | None = None,
    ) -> Tensor:
        """Map `[B, T, D]` of the residual stream to the same.

        `positions` `[B or 1, T]` are those of whole rows in their documents.
        """
        arguments = (self.router, self.experts, x, positions, spikes, routing)
        with recomputed(self._run, *arguments, when=self._layer_again) as out:
            return out

    def feed_sinks(self, x: Tensor, spikes: Spikes | None) -> Tensor:
        """As `forward` without a `Routing` for sinks `[1, S, D]`, which stand before position 0."""
        count = x.shape[1] * self._layers.whole_channels.share.count
        positions = torch.arange(-count, 0, device=x.device)[None]
        return self._run(unobserved(self.router), self.experts, x, positions, spikes, None)

    def enter(self, x: Tensor, spikes: Spikes | None) -> Tensor:
        """Spiked x of the residual stream, as all experts need it."""
        return self._layers.enter(encode(self.in_neuron, x, spikes, f"{self.layer}/ffn_in"))

    def _run(
        self,
        router: Callable[[Tensor], Tensor],
        experts: Callable[..., Tensor],
        x: Tensor,
        positions: Tensor,
        spikes: Spikes | None,
        routing: Routing | None,
    ) -> Tensor:
        """The layer; what FSDP has hooks on is given, so that it runs again without them."""
        with recomputed(router, x, when=self._router_again) as logits:
            choice = self.router.choose(logits, self._held(positions))
        plan = self._spiked(self._plan(choice, routing), x, spikes)
        weights = self._layers.enter(choice.weights)
        with recomputed(self.enter, x, spikes, when=self._norms_again) as entered:
            shared = None if self.shared is None else self.shared(entered, spikes)
            visit = recomputed(
                self._visit, experts, entered, plan, spikes, when=self._experts_again
            )
            with visit as routed:
                out = self._layers.leave(plan.combine(routed, weights))
        out = out if shared is None else out + shared
        return out if routing is None else self._train_router(out, choice, plan, routing)

    def _visit(
        self,
        experts: Callable[..., Tensor],
        entered: Tensor,
        plan: Dispatch,
        spikes: Spikes | None,
    ) -> Tensor:
        """What the experts make of their rows of all tokens."""
        again = self._norms_again and not self._experts_again
        with recomputed(plan.rows, entered, when=again) as rows:
            return experts(rows, plan.groups, spikes)

    def _held(self, positions: Tensor) -> Tensor:
        """Those of the tokens that the residual stream holds here."""
        share = self._layers.whole_channels.share
        count = positions.shape[1] // share.count
        return positions.narrow(1, share.index * count, count)

    @torch.no_grad()
    def _plan(self, choice: Choice, routing: Routing | None) -> Dispatch:
        """Where all tokens go; the same on every rank that shares out channels."""
        return dispatch(
            self._layers.enter(choice.experts),
            self._moe.num_experts,
            capacity_factor=None if routing is None else self._moe.capacity_factor,
        )

    @torch.no_grad()
    def _spiked(self, plan: Dispatch, x: Tensor, spikes: Spikes | None) -> Dispatch:
        """The plan, with what the experts' rows are multiples of where they travel as spikes."""
        neuron, is_asked = self.in_neuron, getattr(self.experts, "sends_spikes", False)
        if spikes is None or not is_asked or not isinstance(neuron, AdaptiveThreshold):
            return plan
        scale = self._layers.enter(neuron.threshold(x, spikes.k))
        return replace(plan, groups=plan.groups.spiked(plan.rows(scale)))

    def _train_router(
        self, out: Tensor, choice: Choice, plan: Dispatch, routing: Routing
    ) -> Tensor:
        """The output with the router's losses in its gradient; adds to the step's sums."""
        num_tokens = plan.place.shape[0] // plan.counts.shape[0]
        losses = router_losses(
            choice,
            plan.counts,
            num_tokens,
            moe=self._moe,
            routing=routing,
            previous_load=self.router.previous_load,
        )
        self._record(choice, plan, routing, balance=losses.balance, z=losses.z)
        loss = losses.balance + losses.z
        return attach(out, loss) if loss.requires_grad else out

    @torch.no_grad()
    def _record(
        self, choice: Choice, plan: Dispatch, routing: Routing, *, balance: Tensor, z: Tensor
    ) -> None:
        """Sums over tokens, each counted on one of the ranks that share out channels."""
        channels = self._layers.whole_channels
        if routing.recorder is None or not channels.is_counted:
            return
        # Every rank knows the choices of whole rows.
        is_first = channels.share.index == 0
        sums = {
            "dropped": plan.num_dropped * is_first,
            "entropy": torch.special.entr(choice.shares).sum(),
            "balance_loss": balance,
            "z_loss": z,
        }
        counts = plan.counts.sum(dim=0) * is_first
        routing.recorder.add(self.layer, counts, sums, choice.logits.abs().amax())
