"""What a training step tells its expert layers, and what they tell it.

Owns the step's denominators and the sums over its tokens; the metrics of a layer are

- `load_<e>`: share of all choices that fell on expert e (before any is dropped); `load_max`,
  `load_min` of them, and `dead_experts`, the number that nobody chose;
- `dropped_share`: share of all choices that found their expert full;
- `entropy`: mean entropy of a token's scores over experts, in nats (log E where they are even);
- `max_logit`: the largest absolute router logit;
- `balance_loss`, `z_loss`: what the layer added to the gradient, coefficients included.

Shape letters: E experts, W ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from models.expert_config import ExpertConfig

SUMS = ("dropped", "entropy", "balance_loss", "z_loss")
"""What is added up over tokens besides the choices of each expert."""


class RoutingRecorder:
    """Sums of one rank over the tokens that it counts, by layer."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}
        self._max_logits: dict[int, Tensor] = {}
        self._is_paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Ignore what is added inside, as a recomputed forward pass needs."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    @torch.no_grad()
    def add(
        self, layer: int, counts: Tensor, sums: Mapping[str, Tensor], max_logit: Tensor
    ) -> None:
        """Add a microbatch: choices of each expert `[E]`, scalars named in `SUMS`."""
        if self._is_paused:
            return
        scalars = torch.stack([sums[name].double() for name in SUMS])
        vector = torch.cat([counts.double(), scalars])
        before = self._sums.get(layer)
        self._sums[layer] = vector if before is None else before + vector
        largest = max_logit.double()
        earlier = self._max_logits.get(layer)
        self._max_logits[layer] = largest if earlier is None else torch.maximum(earlier, largest)

    def tensors(self, *, rank: int, num_ranks: int) -> dict[str, Tensor]:
        """By layer float64 `[E + len(SUMS) + W]`, to be summed over ranks.

        Each rank has a place of its own for its largest logit, so that sums keep all of them.
        """
        places = {
            layer: torch.nn.functional.pad(largest[None], (rank, num_ranks - rank - 1))
            for layer, largest in self._max_logits.items()
        }
        return {str(layer): torch.cat([sums, places[layer]]) for layer, sums in self._sums.items()}


@dataclass(frozen=True, slots=True)
class Routing:
    """A training step, as expert layers need it; without one they evaluate.

    Args:
        num_rows: packed rows of the whole step, on all ranks.
        num_tokens: tokens of the whole step.
        recorder: takes sums, if any.
    """

    num_rows: int
    num_tokens: int
    recorder: RoutingRecorder | None = None


@dataclass(frozen=True, slots=True)
class StepRouting:
    """What all tokens of a step chose, by layer: counts `[E]` and other sums, on the CPU.

    `num_choices` is the number of tokens times that of experts which each visits.
    """

    counts: Mapping[int, Tensor]
    sums: Mapping[int, Mapping[str, float]]
    max_logits: Mapping[int, float]
    num_tokens: int
    num_choices: int

    @classmethod
    def of(cls, summed: Mapping[str, Tensor], moe: ExpertConfig, *, num_tokens: int) -> StepRouting:
        """From the tensors of all ranks' recorders, summed."""
        num_experts = moe.num_experts
        end = num_experts + len(SUMS)
        layers = {int(name): vector for name, vector in summed.items()}
        order = sorted(layers)
        return cls(
            counts={layer: layers[layer][:num_experts] for layer in order},
            sums={
                layer: dict(zip(SUMS, layers[layer][num_experts:end].tolist(), strict=True))
                for layer in order
            },
            max_logits={layer: float(layers[layer][end:].max()) for layer in order},
            num_tokens=num_tokens,
            num_choices=num_tokens * moe.top_k,
        )

    def loads(self, layer: int) -> Tensor:
        """Share of each expert in a layer's choices, `[E]`."""
        return self.counts[layer] / self.num_choices

    def metrics(self) -> dict[str, float]:
        """`moe/<layer>/<metric>` of each layer, and the losses of all layers together."""
        rows: dict[str, float] = {}
        for layer, counts in self.counts.items():
            loads, sums = self.loads(layer), self.sums[layer]
            metrics = {
                "load_max": float(loads.max()),
                "load_min": float(loads.min()),
                "dead_experts": float((counts == 0).sum()),
                "dropped_share": sums["dropped"] / self.num_choices,
                "entropy": sums["entropy"] / self.num_tokens,
                "max_logit": self.max_logits[layer],
            }
            rows |= {f"moe/{layer}/{name}": value for name, value in metrics.items()}
        for name in ("balance_loss", "z_loss"):
            rows[f"moe/{name}"] = sum(sums[name] for sums in self.sums.values())
        return rows

    def load_metrics(self) -> dict[str, float]:
        """`moe/<layer>/load_<expert>` of every expert."""
        return {
            f"moe/{layer}/load_{expert}": load
            for layer in self.counts
            for expert, load in enumerate(self.loads(layer).tolist())
        }
