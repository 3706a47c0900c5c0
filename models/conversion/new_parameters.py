"""How parameters start that a Transformer does not have: gates, norms, key biases, routers, sinks.

The values are functions of options, seed and names alone; what sample text fits comes later.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from models.config import ModelConfig

XAVIER_GAIN = 2**-2.5
"""Gain of the public module's gate initialisation."""


class NormInit(Enum):
    """How the head norm of an `L` layer and the norms of parallel branches start."""

    calibrated = "calibrated"
    ones = "ones"


class KeyBias(Enum):
    """What happens to the key bias of a layer that becomes `L`.

    Softmax ignores a constant added to all keys, a ReLU map does not: `centre` takes the bias that
    makes keys zero on average over sample text, `zero` drops it.
    """

    keep = "keep"
    zero = "zero"
    centre = "centre"


class UpcycleMode(Enum):
    """How copies of a dense FFN are scaled where it becomes experts.

    `exact`: down projections by what a router at zero gives, and such a router. `measured`: a
    random router, down projections by what it gives on sample text, layer by layer. `paper`: a
    random router, all three matrices by the report's factor, which is approximate.
    """

    exact = "exact"
    measured = "measured"
    paper = "paper"


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionOptions:
    """How new parameters start.

    `gate_init` is `zero` or a half-life in tokens. `router_std` is that of random routers; None is
    the model's `initializer_range`.
    """

    gate_init: float | str = "zero"
    norm_init: NormInit = NormInit.calibrated
    key_bias: KeyBias = KeyBias.keep
    upcycle: UpcycleMode = UpcycleMode.exact
    router_std: float | None = None
    seed: int = 1

    def router_std_of(self, target: ModelConfig) -> float:
        """Standard deviation of new routers; 0: they start at zero."""
        if self.upcycle is UpcycleMode.exact:
            return 0.0
        return target.initializer_range if self.router_std is None else self.router_std


def gate_bias_of(gate_init: float | str, normalizer: float) -> float:
    """The gate bias whose decay exp(logsigmoid(bias) / normalizer) halves in `gate_init` tokens.

    `zero` is bias 0: a half-life of exactly `normalizer` tokens. Above 10^6 tokens the gate's
    gradient (1 - sigmoid) all but vanishes and training could not move it; below 1 nothing is kept.

    Raises:
        ValueError: another word, or a half-life outside 1 to 10^6 tokens.
    """
    if gate_init == "zero":
        return 0.0
    try:
        half_life = float(gate_init)
    except ValueError:
        half_life = math.nan
    if not 1 <= half_life <= 1e6:
        raise ValueError(
            f"gate_init ({gate_init}) must be zero or a half-life of 1 to 1000000 tokens. "
            f"zero is {normalizer:g} tokens."
        )
    return -math.log(math.expm1(normalizer * math.log(2) / half_life))


def xavier(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Xavier-uniform with the public module's gain, float32, drawn from (seed, name) alone."""
    generator = _generator(name, seed)
    bound = XAVIER_GAIN * math.sqrt(6 / (shape[0] + shape[1]))
    return (torch.rand(shape, generator=generator) * 2 - 1) * bound


def normal(name: str, shape: tuple[int, ...], seed: int, std: float) -> Tensor:
    """Normal values, float32, drawn from (seed, name) alone."""
    return torch.empty(shape).normal_(0.0, std, generator=_generator(name, seed))


def _generator(name: str, seed: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
