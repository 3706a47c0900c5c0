"""Sink tokens: learned embeddings that every token of every document sees (`model.sinks`).

SpikingBrain report, section 2.2. Sinks see each other and no token, so that they are the same for
all rows: one stream `[1, S, D]` runs beside the tokens' through the same norms, projections and
feed-forward layers, as a second call that nobody counts (`models.recompute.unobserved`). What a
mixer's tokens get from it, its cores say. Sinks have no loss, no part in the balance of experts, no
capacity and no spike statistics.

Shape letters: S sinks, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.mixer_config import SinkConfig, SinkRope
from models.spiking.channels import WHOLE_ROWS, TokenShare


class SinkTokens(nn.Module):
    """The embeddings `[S, D]`, where every stream of sinks begins.

    `share` says which of them the residual stream holds. The weight holds NaN until initialised or
    loaded.
    """

    def __init__(
        self, num_tokens: int, hidden_size: int, *, share: TokenShare = WHOLE_ROWS
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((num_tokens, hidden_size), float("nan")))
        self._share = share

    def forward(self) -> Tensor:
        """The stream `[1, S, D]` before the first layer: this rank's sinks."""
        count = self.weight.shape[0] // self._share.count
        return self.weight.narrow(0, self._share.index * count, count)[None]


def first_position(config: SinkConfig) -> int | None:
    """Where the first sink stands for rotary positions; None where they have none."""
    starts = {SinkRope.before: -config.num_tokens, SinkRope.absolute: 0, SinkRope.none: None}
    return starts[config.rope]
