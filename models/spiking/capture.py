"""The raw counts of chosen sites in one forward pass, for looking at spikes one by one."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from models.spiking.channels import WHOLE_ROWS, TokenShare
from models.spiking.recorder import SpikeRecorder


class CountCapture(SpikeRecorder):
    """A recorder that also keeps every count of some sites; for short texts only.

    `counts` maps `<layer>/<site>` to `[tokens, channels]` int64, passes of one site in order.
    """

    def __init__(self, sites: Collection[str]) -> None:
        super().__init__(num_tokens=1)
        self._sites = frozenset(sites)
        self.counts: dict[str, Tensor] = {}

    @torch.no_grad()
    def record_activations(
        self,
        layer_site: str,
        x: Tensor,
        threshold: Tensor,
        *,
        max_count: int | None = None,
        share: TokenShare = WHOLE_ROWS,
    ) -> None:
        """Keep the counts of x `[..., D]` if the site was asked for."""
        super().record_activations(layer_site, x, threshold, max_count=max_count, share=share)
        if self.is_paused or layer_site not in self._sites:
            return
        counts = torch.div(x, threshold).round_().reshape(-1, x.shape[-1])
        if max_count is not None:
            counts = counts.clamp_(-max_count, max_count)
        whole = counts.to(torch.int64).cpu()
        before = self.counts.get(layer_site)
        self.counts[layer_site] = whole if before is None else torch.cat([before, whole])
