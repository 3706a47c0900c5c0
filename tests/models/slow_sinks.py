"""A model with sink tokens, slowly: sinks in front of every single document, dense masks.

Computes one document at a time from weights by name, in plain operations; nothing of it is the
model's code but rotary angles. Shape letters: S sinks, T tokens of a document, P = S + T, D hidden,
N query heads, G key-value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from models.config import ModelConfig
from models.mixer_config import (
    BranchMerge,
    BranchNorm,
    BranchProjections,
    FeatureMap,
    GateKind,
    SinkRope,
)
from models.rotary import Rotary, rotate
from models.sequence import SequenceContext

KIND_OF = {"L": "linear", "S": "sliding_window", "F": "full"}


class SlowModel:
    """Hidden states of tokens `[B, T, D]`; `scores` are those of routers, by layer."""

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, Tensor], *, k: float | None = None
    ) -> None:
        self.config, self.weights, self.k = config, weights, k
        self.num_sinks = config.sinks.num_tokens
        self.logits: dict[int, list[Tensor]] = {}

    def losses(self, tokens: Tensor, sequence: SequenceContext, labels: Tensor) -> Tensor:
        """Summed cross entropy."""
        hidden = self.hidden(tokens, sequence)
        logits = hidden @ self.weights["head.weight"].T
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")

    def hidden(self, tokens: Tensor, sequence: SequenceContext) -> Tensor:
        documents = torch.split(tokens.flatten(), list(sequence.lengths))
        out = torch.cat([self._document(document) for document in documents])
        return out.view(*tokens.shape, -1)

    def _document(self, tokens: Tensor) -> Tensor:
        x = torch.cat([self.weights["sinks.weight"], self.weights["embedding.weight"][tokens]])
        layers = zip(self.config.layers.mixers, self.config.layers.ffns, strict=True)
        for layer, (mixers, ffn) in enumerate(layers):
            own = {
                name.removeprefix(f"blocks.{layer}."): value
                for name, value in self.weights.items()
                if name.startswith(f"blocks.{layer}.")
            }
            if mixers:
                x = x + self._mixer(own, [m.value for m in mixers], x)
            normed = self._rms(x, own["ffn_norm.weight"])
            if ffn.value == "d":
                x = x + self._swiglu(own, "ffn", self._spike(normed))
            else:
                x = x + self._experts(own, layer, normed)
        return self._rms(x[self.num_sinks :], self.weights["final_norm.weight"])

    def _mixer(self, own: Mapping[str, Tensor], letters: list[str], x: Tensor) -> Tensor:
        branches, count = self.config.branches, len(letters)
        x = self._spike(self._rms(x, own["mixer_norm.weight"]))
        is_before = branches.norm is BranchNorm.before_output
        joined: dict[str, Tensor] = {}
        total = torch.zeros_like(x)
        for index, letter in enumerate(letters):
            home = f"mixer.{KIND_OF[letter]}." if count > 1 else "mixer."
            shared = count == 1 or branches.projections is BranchProjections.shared
            projections = "mixer." if shared else home
            heads, is_there = self._heads(own, letter, home, projections, x)
            if letter == "L" or (count > 1 and is_before):
                eps = self.config.linear.norm_eps if letter == "L" else None
                heads = self._rms(heads, own[f"{home}head_norm.weight"], eps)
            weight: Tensor | float = 1.0
            if count > 1 and branches.merge is BranchMerge.mean:
                weight = 1 / count
            if count > 1 and branches.merge is BranchMerge.learned:
                weight = own["mixer.merge.weight"][index]
            flat = heads.flatten(1)
            if is_before or count == 1:
                part = torch.where(is_there, weight * flat, 0.0)
                joined[projections] = joined.get(projections, 0.0) + part
                joined[f"{projections}there"] = joined.get(f"{projections}there", False) | is_there
                continue
            out = self._linear(own, f"{projections}o_proj", self._spike(flat))
            normed = self._rms(out, own[f"{home}output_norm.weight"])
            total = total + torch.where(is_there, weight * normed, 0.0)
        for name in [name for name in joined if not name.endswith("there")]:
            out = self._linear(own, f"{name}o_proj", self._spike(joined[name]))
            total = total + torch.where(joined[f"{name}there"], out, 0.0)
        return total

    def _heads(
        self, own: Mapping[str, Tensor], letter: str, home: str, projections: str, x: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Head outputs `[P, N, H]`, and of whom `[P, 1]`."""
        config, sinks = self.config, self.num_sinks
        q, k, v = (
            self._linear(own, f"{projections}{name}_proj", x).view(len(x), -1, config.head_dim)
            for name in "qkv"
        )
        if config.qk_norm:
            q = self._rms(q, own[f"{projections}q_norm.weight"])
            k = self._rms(k, own[f"{projections}k_norm.weight"])
        is_there = torch.ones(len(x), 1, dtype=torch.bool)
        if letter != "L":
            return self._softmax(letter, q, k, v), is_there
        if config.linear.gate is GateKind.key_tied:
            u = torch.sigmoid(k - config.linear.gate_offset)
            k = (1 - config.linear.gate_floor) * u
            decay = 1 - k
        else:
            z = x @ own[f"{home}gate_down.weight"].T @ own[f"{home}gate_up.weight"].T
            z = torch.sigmoid(z + own[f"{home}gate_up.bias"])
            decay = (z ** (1 / config.linear.gate_logit_normalizer)).view(k.shape)
            k = k.relu() if config.linear.feature_map is FeatureMap.relu else k.sigmoid()
        q = q.relu() if config.linear.feature_map is FeatureMap.relu else q.sigmoid()
        first = 0 if config.sinks.through_linear else sinks
        is_there[:first] = False
        group = q.shape[1] // k.shape[1]
        state = x.new_zeros(k.shape[1], config.head_dim, config.head_dim)
        outputs = [q[0] * 0] * first
        for step in range(first, len(x)):
            state = decay[step][..., None] * state + k[step][..., None] * v[step][:, None]
            read = state.repeat_interleave(group, dim=0)
            outputs.append(config.head_dim**-0.5 * torch.einsum("nk,nkv->nv", q[step], read))
        return torch.stack(outputs), is_there

    def _softmax(self, letter: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """All keys in one softmax, sinks first."""
        config, sinks, length = self.config, self.num_sinks, len(q)
        group = q.shape[1] // k.shape[1]
        k, v = (each.repeat_interleave(group, dim=1) for each in (k, v))
        start = {SinkRope.before: -sinks, SinkRope.absolute: 0, SinkRope.none: 0}
        of_sinks = torch.arange(sinks) + start[config.sinks.rope]
        positions = torch.cat([of_sinks, torch.arange(length - sinks)])
        rotation = Rotary(config).compute(positions[None], q.dtype)
        rotated = [rotate(each[None], rotation)[0] for each in (q, k)]
        scores = torch.einsum("qnh,knh->nqk", *rotated)
        if config.sinks.rope is SinkRope.none:
            plain = torch.einsum("qnh,knh->nqk", q, k)
            scores = torch.cat([plain[..., :sinks], scores[..., sinks:]], dim=-1)
        i, j = torch.arange(length)[:, None], torch.arange(length)[None]
        visible = (j <= i) & (i >= sinks)
        if letter == "S":
            assert config.window_tokens is not None
            visible &= i - j < config.window_tokens
        visible |= j < sinks
        scores = (scores * config.head_dim**-0.5).masked_fill(~visible, float("-inf"))
        return torch.einsum("nqk,knh->qnh", scores.softmax(-1), v)

    def _experts(self, own: Mapping[str, Tensor], layer: int, x: Tensor) -> Tensor:
        """Every expert on everybody, masked."""
        moe = self.config.moe
        logits = x @ own["ffn.router.weight"].T
        self.logits.setdefault(layer, []).append(logits[self.num_sinks :])
        scores = logits.softmax(-1)
        chosen = torch.zeros_like(scores).scatter(1, scores.topk(moe.top_k).indices, 1.0)
        entered = self._spike(x)
        out = torch.zeros_like(x)
        if moe.num_shared_experts:
            out = out + self._swiglu(own, "ffn.shared", entered)
        for expert in range(moe.num_experts):
            gate, up, down = (
                own[f"ffn.experts.{name}_proj.weight"][expert] for name in ("gate", "up", "down")
            )
            inner = self._spike(F.silu(entered @ gate.T) * (entered @ up.T))
            out = out + (chosen * scores)[:, expert, None] * (inner @ down.T)
        return out

    def _swiglu(self, own: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
        gate = self._linear(own, f"{name}.gate_proj", x)
        inner = F.silu(gate) * self._linear(own, f"{name}.up_proj", x)
        return self._linear(own, f"{name}.down_proj", self._spike(inner))

    def _linear(self, own: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
        out = x @ own[f"{name}.weight"].T
        return out + own[f"{name}.bias"] if f"{name}.bias" in own else out

    def _rms(self, x: Tensor, weight: Tensor, eps: float | None = None) -> Tensor:
        eps = self.config.rms_norm_eps if eps is None else eps
        return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight

    def _spike(self, x: Tensor) -> Tensor:
        """With the threshold a constant and the round an identity in the gradient."""
        if self.k is None:
            return x
        threshold = (x.abs().mean(dim=-1, keepdim=True) / self.k).clamp(min=1e-5).detach()
        return x + (threshold * torch.round(x / threshold) - x).detach()
