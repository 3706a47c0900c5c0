"""How parameters start that a Transformer does not have: gates, head norms, key biases.

The values are functions of options, seed and names alone; what sample text fits comes later.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

XAVIER_GAIN = 2**-2.5
"""Gain of the public module's gate initialisation."""


class NormInit(Enum):
    """How the head norm of an `L` layer starts."""

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


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionOptions:
    """How new parameters start. `gate_init` is `zero` or a half-life in tokens."""

    gate_init: float | str = "zero"
    norm_init: NormInit = NormInit.calibrated
    key_bias: KeyBias = KeyBias.keep
    seed: int = 1


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
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    bound = XAVIER_GAIN * math.sqrt(6 / (shape[0] + shape[1]))
    return (torch.rand(shape, generator=generator) * 2 - 1) * bound
