"""How the input of a neuron lies over ranks: whose channels, whose tokens, who counts them.

A neuron needs the mean of |x| over all channels of a token and its statistics over all of them,
wherever the values are. Local values describe themselves; a layer provider describes cut ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def mean_abs(x: Tensor) -> Tensor:
    """Mean of |x| over the last dim, `[..., D]` to `[..., 1]`, in at least float32."""
    # Twice as fast on CPU as vector_norm(ord=1), one pass more on a GPU.
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.abs().mean(dim=-1, keepdim=True, dtype=dtype)


@dataclass(frozen=True, slots=True)
class TokenShare:
    """Tokens `index * T` to `(index + 1) * T` of rows that are `count * T` tokens long."""

    index: int = 0
    count: int = 1


WHOLE_ROWS = TokenShare()


@dataclass(frozen=True, slots=True)
class Channels:
    """What a neuron sees of a site.

    Args:
        mean_abs: the mean of |x| over all channels of a token, `[..., D]` to `[..., 1]`, in at
            least float32. Where channels are cut over ranks its gradient is summed over them too.
        share: which tokens of each row `x` holds.
        is_counted: whether statistics of these values are this rank's to keep; False where
            another rank holds the same ones.
    """

    mean_abs: Callable[[Tensor], Tensor] = mean_abs
    share: TokenShare = WHOLE_ROWS
    is_counted: bool = True


WHOLE_CHANNELS = Channels()
