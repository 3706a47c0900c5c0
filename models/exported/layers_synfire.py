"""The layers of a Synfire model: norms, spikes, mixers, parallel branches.

Module names are those of Synfire's checkpoints. Shape letters: B rows, T tokens, D hidden, N query
heads, G key-value heads, H head dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels_synfire import (
    Stream,
    append,
    attend_all,
    linear_attention,
    rotate,
    softmax_attention,
    widened,
)

KINDS = {"F": "full", "S": "sliding_window", "L": "linear"}

Heads = tuple[Tensor, Tensor, Tensor]
"""Queries `[B, T, N, H]`, keys and values `[B, T, G, H]`."""


class RMSNorm(nn.Module):
    """`x / rms(x) * weight` over the last dim, in at least float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype."""
        wide = widened(x)
        scale = (wide.square().mean(dim=-1, keepdim=True) + self.eps).rsqrt()
        return (wide * scale * self.weight.to(wide.dtype)).to(x.dtype)


def spike(x: Tensor, spiking: dict[str, Any] | None) -> Tensor:
    """The adaptive-threshold neuron: `V round(x / V)` with V = mean|x| / k over the channels.

    The gradient is that of x.
    """
    if spiking is None:
        return x
    with torch.no_grad():
        wide = widened(x)
        threshold = (wide.abs().mean(dim=-1, keepdim=True) / spiking["k"]).clamp(1e-5, 1e4)
        counts = (x / threshold).round()
        if spiking["max_count"] is not None:
            counts = counts.clamp(-spiking["max_count"], spiking["max_count"])
        spiked = torch.lerp(wide, counts * threshold, spiking["blend"])
    return spiked.to(x.dtype) + (x - x.detach())


class Projections(nn.Module):
    """To queries, keys and values, and back; `exist` is whether they are here."""

    def __init__(self, config: Any, *, exist: bool) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        self.spiking = config.spiking
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        if not exist:
            return
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        hidden, bias = config.hidden_size, config.qkv_bias
        self.q_proj = nn.Linear(hidden, queries, bias=bias)
        self.k_proj = nn.Linear(hidden, keys, bias=bias)
        self.v_proj = nn.Linear(hidden, keys, bias=bias)
        self.o_proj = nn.Linear(queries, hidden, bias=config.output_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def project(self, x: Tensor) -> Heads:
        """Of `[B, T, D]`."""
        q, k, v = (
            linear(x).unflatten(-1, (-1, self.head_dim))
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def combine(self, heads: Tensor) -> Tensor:
        """Head outputs `[B, T, N, H]` back to `[B, T, D]`."""
        out: Tensor = self.o_proj(spike(heads.flatten(2), self.spiking))
        return out


class Mixer(Projections):
    """A mixer of its own, or one branch of two, which may read the projections of both."""

    def __init__(self, config: Any, *, has_projections: bool) -> None:
        super().__init__(config, exist=has_projections)
        self.head_norm: nn.Module | None = None
        self.output_norm: nn.Module | None = None

    def forward(self, x: Tensor, stream: Stream) -> Tensor | None:
        """Mix `[B, T, D]`; None where nothing mixes these tokens."""
        x = spike(x, self.spiking)
        mixed = self.mix(x, self.project(x), stream)
        return None if mixed is None else self.combine(mixed)

    def mix(self, x: Tensor, heads: Heads, stream: Stream) -> Tensor | None:
        """Head outputs `[B, T, N, H]` of spiked x, after the head norm."""
        mixed = self.attend(x, heads, stream)
        return mixed if mixed is None or self.head_norm is None else self.head_norm(mixed)

    def attend(self, x: Tensor, heads: Heads, stream: Stream) -> Tensor | None:
        """The same before the head norm."""
        raise NotImplementedError


class SoftmaxMixer(Mixer):
    """Full or sliding-window attention with rotary positions."""

    def __init__(self, config: Any, kind: str, *, has_projections: bool, is_branch: bool) -> None:
        super().__init__(config, has_projections=has_projections)
        self.turns_sinks = config.sinks["rope"] != "none"
        self.window: int | None = None
        if kind == "sliding_window":
            self.window = config.window_tokens + (0 if config.window_includes_self else 1)
        self.names = f"{kind}.keys", f"{kind}.values"
        if is_branch and config.branches["norm"] == "before_output":
            self.head_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def attend(self, x: Tensor, heads: Heads, stream: Stream) -> Tensor:
        """See `Mixer`. Sinks attend to all sinks; what they leave is their keys and values."""
        q, k, v = rotate(heads[0], stream.rotation), rotate(heads[1], stream.rotation), heads[2]
        if stream.place is None:
            stream.sinks.update(zip(self.names, (k, v), strict=True))
            return attend_all(q, k, v, scale=self.scale)
        k, v = (self._remember(stream, *pair) for pair in zip(self.names, (k, v), strict=True))
        sinks = None
        if stream.sinks:
            sinks = stream.sinks[self.names[0]], stream.sinks[self.names[1]]
            if not self.turns_sinks:
                # In twice the channels sinks meet the queries as they were before they turned.
                sinks = F.pad(sinks[0], (self.head_dim, 0)), sinks[1]
                q, k = torch.cat([q, heads[0]], dim=-1), F.pad(k, (0, self.head_dim))
        return softmax_attention(
            q, k, v, stream.place, scale=self.scale, window=self.window, sinks=sinks
        )

    def _remember(self, stream: Stream, name: str, new: Tensor) -> Tensor:
        """Earlier ones with the new ones; keeps those that a later token may see."""
        if stream.state is None or stream.place is None:
            return new
        joined = append(stream.state.get(name), new, stream.place.pads)
        unseen = 0 if self.window is None else max(0, joined.shape[1] - self.window + 1)
        stream.state[name] = joined[:, unseen:].clone() if unseen else joined
        return joined


class LinearMixer(Mixer):
    """Gated linear attention; its state is as large as one token's keys times values."""

    def __init__(self, config: Any, *, has_projections: bool) -> None:
        super().__init__(config, has_projections=has_projections)
        self.options = config.linear
        self.mixes_sinks = config.sinks["through_linear"]
        if self.options["gate"] == "low_rank":
            rank = self.options["gate_low_rank_dim"]
            keys = config.num_key_value_heads * config.head_dim
            self.gate_down = nn.Linear(config.hidden_size, rank, bias=False)
            self.gate_up = nn.Linear(rank, keys, bias=True)
        self.head_norm = RMSNorm(config.head_dim, self.options["norm_eps"])

    def attend(self, x: Tensor, heads: Heads, stream: Stream) -> Tensor | None:
        """See `Mixer`. Sinks run through it or not; what they leave is the first state."""
        are_sinks = stream.place is None
        if are_sinks and not self.mixes_sinks:
            return None
        q, k, v = heads
        q = q.relu() if self.options["feature_map"] == "relu" else q.sigmoid()
        k, log_decay = self._keys_and_decays(x, k)
        is_real = None if stream.place is None else stream.place.is_real
        if is_real is not None:
            k, log_decay = (each * is_real[:, :, None, None] for each in (k, log_decay))
        state = None if stream.state is None else stream.state.get("linear")
        if state is None:
            empty = log_decay.new_zeros(1, *k.shape[2:], k.shape[-1])
            first = empty if are_sinks else stream.sinks.get("linear", empty)
            state = first.expand(len(k), -1, -1, -1)
        out, state = linear_attention(q, k, v, log_decay, state, scale=self.scale)
        if are_sinks:
            stream.sinks["linear"] = state
        elif stream.state is not None:
            stream.state["linear"] = state
        return out

    def _keys_and_decays(self, x: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Keys `[B, T, G, H]` and the natural log of decays, at most 0, in at least float32."""
        if self.options["gate"] == "key_tied":
            u, floor = widened(k) - self.options["gate_offset"], self.options["gate_floor"]
            log_decay = F.logsigmoid(-u)
            if floor > 0:
                lowest = torch.full_like(log_decay, math.log(floor))
                log_decay = torch.logaddexp(lowest, math.log1p(-floor) + log_decay)
            return ((1 - floor) * u.sigmoid()).to(k.dtype), log_decay
        low_rank = _wide_linear(self.gate_down, widened(x))
        logits = _wide_linear(self.gate_up, low_rank).view(k.shape)
        k = k.relu() if self.options["feature_map"] == "relu" else k.sigmoid()
        return k, F.logsigmoid(logits) / self.options["gate_logit_normalizer"]


def _wide_linear(linear: nn.Linear, x: Tensor) -> Tensor:
    """In x's precision, whatever the weight's is."""
    bias = None if linear.bias is None else linear.bias.to(x.dtype)
    return F.linear(x, linear.weight.to(x.dtype), bias)


class Merge(nn.Module):
    """Weights of branches: 1 each, 1 over their number, or learned ones."""

    def __init__(self, kind: str, num_branches: int) -> None:
        super().__init__()
        self.factor = 1 / num_branches if kind == "mean" else 1.0
        self.weight: nn.Parameter | None = None
        if kind == "learned":
            self.weight = nn.Parameter(torch.ones(num_branches))

    def forward(self, branch: Tensor, index: int) -> Tensor:
        """One weighed branch, in at least float32."""
        wide = widened(branch)
        return wide * (self.factor if self.weight is None else self.weight[index].to(wide.dtype))


class ParallelMixers(Projections):
    """Two mixers on one input, normalised, weighed and added before or after the projection back.

    Branches are named after their kinds.
    """

    def __init__(self, config: Any, kinds: list[str]) -> None:
        options = config.branches
        super().__init__(config, exist=options["projections"] == "shared")
        self.kinds = kinds
        self.is_shared = options["projections"] == "shared"
        self.merges_heads = options["norm"] == "before_output"
        self.merge = Merge(options["merge"], len(kinds))
        for kind in kinds:
            branch = _mixer(config, kind, has_projections=not self.is_shared, is_branch=True)
            if not self.merges_heads:
                branch.output_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.add_module(kind, branch)

    def forward(self, x: Tensor, stream: Stream) -> Tensor | None:
        """Mix `[B, T, D]`."""
        x = spike(x, self.spiking)
        shared = self.project(x) if self.is_shared else None
        heads: list[Tensor] = []
        outputs: list[Tensor] = []
        for index, kind in enumerate(self.kinds):
            branch: Mixer = self.get_submodule(kind)  # type: ignore[assignment]
            mixed = branch.mix(x, shared or branch.project(x), stream)
            if mixed is None:
                continue
            combine = self.combine if self.is_shared else branch.combine
            if branch.output_norm is not None:
                outputs.append(self.merge(branch.output_norm(combine(mixed)), index))
            elif self.is_shared:
                heads.append(self.merge(mixed, index))
            else:
                outputs.append(combine(self.merge(mixed, index).to(x.dtype)))
        if heads:
            outputs = [self.combine(sum(heads[1:], heads[0]).to(x.dtype))]
        return sum(outputs[1:], outputs[0]).to(x.dtype)


def _mixer(config: Any, kind: str, *, has_projections: bool, is_branch: bool) -> Mixer:
    if kind == "linear":
        return LinearMixer(config, has_projections=has_projections)
    return SoftmaxMixer(config, kind, has_projections=has_projections, is_branch=is_branch)


def build_mixer(config: Any, letters: str) -> Mixer | ParallelMixers:
    """The mixer of a layer by its pattern letters, `X` or `X+Y`."""
    kinds = [KINDS[letter] for letter in letters.split("+")]
    if len(kinds) > 1:
        return ParallelMixers(config, kinds)
    return _mixer(config, kinds[0], has_projections=True, is_branch=False)
