"""Upcycling: a dense FFN becomes the routed and the shared experts of a layer `e`.

Every expert is a copy of the FFN, scaled so that their weighted sum is the FFN again (SpikingBrain
report, section 3.2, equations 15-18). A layer's factor is exact where its router weighs the chosen
experts alike for all tokens, so that it starts at zero and ties are broken by the router's hash.

Shape letters: S shared experts, N routed ones, k choices of a token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from models.config import ModelConfig
from models.conversion.huggingface import TensorSource
from models.conversion.new_parameters import ConversionOptions, UpcycleMode, normal
from models.conversion.target_tensor import Copies, Origin, OriginKind, TargetTensor
from models.conversion.weight_map import ffn_parameter
from models.expert_config import ExpertConfig, RouterScore

_DOWN = "down_proj.weight"


def exact_factor(moe: ExpertConfig) -> float:
    """1 / (S + k p0), with p0 the weight of a chosen expert where all logits are zero."""
    even = 1 / moe.num_experts if moe.score is RouterScore.softmax else 0.5
    weight = 1 / moe.top_k if moe.renormalise else even
    return 1 / (moe.num_shared_experts + moe.top_k * weight)


def paper_factor(moe: ExpertConfig) -> float:
    """The cube root of 1 / (S + k / N), for each of the three matrices (equation 18)."""
    return math.pow(moe.num_shared_experts + moe.top_k / moe.num_experts, -1 / 3)


@dataclass(frozen=True, slots=True)
class ExpertPlanner:
    """Explains the tensors of upcycled layers; `scales` are measured factors by layer."""

    source: TensorSource
    target: ModelConfig
    options: ConversionOptions
    scales: Mapping[int, float]
    new_dtype: torch.dtype

    def expert(self, name: str, shape: tuple[int, ...], known: str) -> TargetTensor:
        """Copies of one dense matrix, side by side.

        Args:
            name: of all routed or all shared experts' matrices.
            shape: `[E, ...]` of routed ones, of shared ones as of one larger matrix.
            known: the source's name of the matrix.
        """
        dense = self.source.shape(known)
        factor, reason = self._factor(name)
        if len(shape) > len(dense):
            copies = Copies(shape[0])
        else:
            dim = 1 if name.endswith(_DOWN) else 0
            copies = Copies(shape[dim] // dense[dim], dim)
        notes = [f"{copies.count} copies"] if copies.count > 1 else []
        notes += [] if factor == 1 else [f"by {factor:.6g} ({reason})"]
        kind = OriginKind.scaled if factor != 1 else OriginKind.reshaped
        if kind is OriginKind.reshaped and shape == dense:
            kind = OriginKind.copied
        part = (1, *dense) if len(shape) > len(dense) else dense

        def load() -> Tensor:
            stored = self.source.load(known)
            value = stored if factor == 1 else stored * factor
            return value.view(part)

        origin = Origin(kind, (known,), ", ".join(notes))
        return TargetTensor(name, shape, self.source.dtype(known), origin, load, copies)

    def router(self, name: str, shape: tuple[int, ...]) -> TargetTensor:
        """Weights that start at zero or are drawn; remembered load that starts even."""
        dtype, std = self.new_dtype, self.options.router_std_of(self.target)
        if name.endswith(".previous_load"):
            note, value = "even", torch.full(shape, 1 / shape[0], dtype=dtype)
            return TargetTensor(name, shape, dtype, Origin(OriginKind.new, (), note), lambda: value)
        if std == 0 or name.endswith(".selection_bias"):
            zeros = torch.zeros(shape, dtype=dtype)
            origin = Origin(OriginKind.new, (), "zeros")
            return TargetTensor(name, shape, dtype, origin, lambda: zeros)
        origin = Origin(OriginKind.new, (), f"normal, standard deviation {std:g}")
        seed = self.options.seed
        return TargetTensor(
            name, shape, dtype, origin, lambda: normal(name, shape, seed, std).to(dtype)
        )

    def _factor(self, name: str) -> tuple[float, str]:
        """What a matrix is multiplied by, and why."""
        moe, mode = self.target.moe, self.options.upcycle
        if mode is UpcycleMode.paper:
            return paper_factor(moe), "paper: the cube root of 1 / (S + k / N)"
        if not name.endswith(_DOWN):
            return 1.0, ""
        layer, _ = ffn_parameter(name)
        if mode is UpcycleMode.measured and layer in self.scales:
            return self.scales[layer], "measured: 1 / mean of S + chosen weights"
        return exact_factor(moe), "exact: 1 / (S + k p0)"
