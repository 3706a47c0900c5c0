"""The adaptive-threshold neuron at the inputs of projections, with time collapsed to counts.

SpikingBrain report, section 3.3.1, equations 19 and 21: a token with channels x has the threshold
V = mean|x| / k over all its channels and fires the signed counts round(x / V), so that V * counts
stands in for x. This file owns the encoding and its gradient. It does not own when spiking is on
(`schedule`), what is measured (`recorder`), or how counts spread over time steps (`codes`).

Gradient. Write u = x / V, c = round(u), y = V c, D channels, g the gradient of y. The round counts
as identity in the backward pass (a clip too).

- `detached`: V is a constant, so dy = dx and the gradient is g, unchanged.
- `through`: V moves with x. dy = dx + (c - u) dV, since dy = c dV + V du and V du = dx - u dV.
  With dV = sign(x) . dx / (k D) this adds (sum_j g_j (c_j - u_j)) sign(x_i) / (k D) to g_i: an
  O(1 / D) term per channel. y is homogeneous of degree 1 in x, and this Jacobian J keeps Euler's
  identity J x = y; the detached one gives J x = x. Where V sits on a bound, dV = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.config import NeuronKind, SpikingConfig, ThresholdGrad
from models.spiking.channels import WHOLE_CHANNELS, Channels
from models.spiking.recorder import SpikeRecorder

MIN_THRESHOLD = 1e-5
MAX_THRESHOLD = 1e4


@dataclass(frozen=True, slots=True)
class Spikes:
    """How to spike in one forward pass; a model that gets None instead stays continuous.

    The neuron passes on `(1 - blend) * x + blend * V * counts`. A `recorder` collects statistics.
    """

    k: float
    blend: float = 1.0
    recorder: SpikeRecorder | None = None


class AdaptiveThreshold(nn.Module):
    """Spikes `[..., D]` activations with one threshold a token; has no parameters."""

    def __init__(self, config: SpikingConfig, channels: Channels = WHOLE_CHANNELS) -> None:
        super().__init__()
        self.max_count = config.max_count
        self.threshold_grad = config.threshold_grad
        self._channels = channels

    def forward(self, x: Tensor, spikes: Spikes | None, site: str) -> Tensor:
        """Return the spiked x, same shape and dtype; `site` is `<layer>/<site>` for statistics."""
        if spikes is None:
            return x
        if self.threshold_grad is ThresholdGrad.through:
            threshold = self.threshold(x, spikes.k)
        else:
            with torch.no_grad():
                threshold = self.threshold(x, spikes.k)
        if spikes.recorder is not None and self._channels.is_counted:
            spikes.recorder.record_activations(
                site, x, threshold, max_count=self.max_count, share=self._channels.share
            )
        if spikes.blend == 0.0:
            return x
        spiked: Tensor = _Spike.apply(  # type: ignore[no-untyped-call]
            x, threshold, spikes.blend, self.max_count
        )
        return spiked

    def threshold(self, x: Tensor, k: float) -> Tensor:
        """V `[..., 1]` of equation 19 in at least float32, within the bounds of the report."""
        return (self._channels.mean_abs(x) / k).clamp(MIN_THRESHOLD, MAX_THRESHOLD)

    @torch.no_grad()
    def encode(self, x: Tensor, k: float) -> tuple[Tensor, Tensor]:
        """Return counts `[..., D]` (whole numbers, at least float32) and the threshold `[..., 1]`.

        Halves round to even (`torch.round`), so that an exact tie adds no bias.
        """
        threshold = self.threshold(x, k)
        return _counts(x, threshold, self.max_count), threshold

    def extra_repr(self) -> str:
        """What distinguishes one neuron from another in a printed model."""
        return f"max_count={self.max_count}, threshold_grad={self.threshold_grad.value}"


def build_neuron(
    config: SpikingConfig, channels: Channels = WHOLE_CHANNELS
) -> AdaptiveThreshold | None:
    """Build the configured neuron, or None when spiking is off."""
    if config.neuron is NeuronKind.off:
        return None
    return AdaptiveThreshold(config, channels)


def encode(neuron: nn.Module | None, x: Tensor, spikes: Spikes | None, site: str) -> Tensor:
    """The spiked x, or x itself without a neuron."""
    if neuron is None:
        return x
    spiked: Tensor = neuron(x, spikes, site)
    return spiked


def _counts(x: Tensor, threshold: Tensor, max_count: int | None) -> Tensor:
    """Round x / V in the threshold's precision, in one buffer of its own."""
    counts = torch.div(x, threshold).round_()
    return counts if max_count is None else counts.clamp_(-max_count, max_count)


class _Spike(torch.autograd.Function):
    """(1 - blend) x + blend V round(x / V), with the straight-through gradient of this module."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, threshold: Tensor, blend: float, max_count: int | None
    ) -> Tensor:
        ctx.blend, ctx.max_count = blend, max_count
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(x, threshold)
        spiked = _counts(x, threshold, max_count).mul_(threshold)
        if blend != 1.0:
            spiked = torch.lerp(x.to(spiked.dtype), spiked, blend)
        return spiked.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (grad,) = grads
        if not ctx.needs_input_grad[1]:
            return grad, None, None, None
        x, threshold = ctx.saved_tensors
        residual = _counts(x, threshold, ctx.max_count).sub_(x / threshold)
        grad_threshold = (grad * residual).sum(dim=-1, keepdim=True) * ctx.blend
        return grad, grad_threshold, None, None
