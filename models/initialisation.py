"""Initial weights as a pure function of (seed, parameter name, global shape).

Each tensor is drawn whole, in float32, on the CPU, from its own generator, then cast: the values do
not depend on construction order, dtype, device, sharding or which other parameters exist.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from models.config import ModelConfig
from models.layers import ParamLayout
from models.model import Model


@torch.no_grad()
def initialise(model: Model, *, seed: int) -> None:
    """Fill every parameter of an unsharded model in place.

    Raises:
        ValueError: parameters on the meta device, which hold nothing to fill.
    """
    layouts = model.layouts()
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"{name} (meta device) must be on a device that holds data. "
                "Call model.to_empty(device=...) first, or use tensor_for."
            )
        parameter.copy_(tensor_for(name, layouts[name], model.config, seed))


def tensor_for(name: str, layout: ParamLayout, config: ModelConfig, seed: int) -> Tensor:
    """The initial global tensor of one parameter, float32 on the CPU.

    Norms and the weights of branches are 1. Biases and the gate's second matrix are 0, so that
    every decay starts at exp(log(1/2) / gate_logit_normalizer), a half-life of as many tokens. The
    load that a router remembers starts even. All else is normal with standard deviation
    `initializer_range`.
    """
    shape = layout.global_shape
    if name.endswith(("norm.weight", ".merge.weight")):
        return torch.ones(shape, dtype=torch.float32)
    if name.endswith(".previous_load"):
        return torch.full(shape, 1.0 / shape[0], dtype=torch.float32)
    if name.endswith((".bias", ".gate_up.weight", ".selection_bias")):
        return torch.zeros(shape, dtype=torch.float32)
    generator = torch.Generator(device="cpu").manual_seed(_seed_of(name, seed))
    return torch.empty(shape, dtype=torch.float32).normal_(
        0.0, config.initializer_range, generator=generator
    )


def _seed_of(name: str, seed: int) -> int:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
