"""What spiking costs and saves, measured on a sample of tokens: one count histogram a site.

Owns the accumulation and the metric definitions; does not own the encoding or any communication.
Everything is kept as float64 sums, so that results add over microbatches and over ranks.

The metrics of a site, all over single values (one channel of one token). The expansion meant below
is the bidirectional bitwise one (`codes`), 9 steps long: three windows of 3 steps, unused leading
steps silent.

- `mean_count`: mean |count|.
- `mean_spikes`: mean number of spikes (set bits) a value emits; the report's energy multiplies it.
- `firing_rate`: share of the 9 steps that carry a spike, mean_spikes / 9 (sparsity definition 2,
  "per-step").
- `silent_share`: share of values with count 0 (definition 3, "silent channels").
- `window_sparsity`: share of all-zero windows among the three (definition 1; the one that
  reproduces the report's 69 % at k = 3 on Gaussian activations).
- `share_le_7`: share of values with |count| <= 7, which fit in one window.
- `clipped_share`: share of values that `max_count` cut (0 without a clip).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy

import torch
from torch import Tensor

from models.spiking.channels import WHOLE_ROWS, TokenShare

WINDOW_STEPS = 3
NUM_WINDOWS = 3
NUM_STEPS = WINDOW_STEPS * NUM_WINDOWS
NUM_BINS = 2**NUM_STEPS
"""Magnitudes 0 to 511 have a bin each; the last bin also holds all above (9 steps cannot)."""
METRICS = (
    "mean_count", "mean_spikes", "firing_rate", "silent_share",
    "window_sparsity", "share_le_7", "clipped_share",
)  # fmt: skip


class SpikeRecorder:
    """Accumulates count statistics per `<layer>/<site>` from at most `num_tokens` tokens a call."""

    def __init__(self, num_tokens: int) -> None:
        if num_tokens < 1:
            raise ValueError(f"num_tokens ({num_tokens}) must be at least 1: nothing is sampled.")
        self.num_tokens = num_tokens
        self._sums: dict[str, Tensor] = {}
        self.is_paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Ignore records inside, as a recomputed forward pass needs; nests."""
        before, self.is_paused = self.is_paused, True
        try:
            yield
        finally:
            self.is_paused = before

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
        """Sample tokens of x `[..., D]` with thresholds `[..., 1]` and record their counts.

        With a `share` of the tokens, x `[B, T, D]` gives those of the sampled ones that it holds.
        """
        if self.is_paused:
            return
        sampled, thresholds = self._sample(x, share), self._sample(threshold, share)
        self._accumulate(layer_site, torch.div(sampled, thresholds).round_(), max_count)

    @torch.no_grad()
    def record(self, layer_site: str, counts: Tensor, *, max_count: int | None = None) -> None:
        """Sample tokens of `[..., D]` unclipped counts and add them to the sums of one site."""
        if not self.is_paused:
            self._accumulate(layer_site, self._sample(counts).clone(), max_count)

    def sampled(self, num_tokens: int) -> slice:
        """Which of so many tokens are recorded: evenly spaced, centred."""
        step = -(-num_tokens // self.num_tokens) or 1
        return slice((step - 1) // 2, None, step)

    def of_all(self) -> SpikeRecorder:
        """A recorder into the same sums that leaves out no token."""
        other = copy(self)
        other.num_tokens = sys.maxsize
        return other

    def tensors(self) -> dict[str, Tensor]:
        """Per site float64 `[NUM_BINS + 2]`: histogram of |count|, sum of |count|, clipped values.

        Vectors of the same site from several ranks or microbatches add up.
        """
        return dict(self._sums)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the sums, by what `tensors` of one or (summed) several recorders gave.

        Raises:
            ValueError: a vector of another length.
        """
        for layer_site, sums in tensors.items():
            if sums.shape != (NUM_BINS + 2,):
                raise ValueError(
                    f"tensors[{layer_site}] {tuple(sums.shape)} must have shape {(NUM_BINS + 2,)}. "
                    f"Load what tensors() returned."
                )
        self._sums = {name: sums.to(torch.float64) for name, sums in tensors.items()}

    def clear(self) -> None:
        """Forget everything recorded."""
        self._sums = {}

    def summary(self) -> dict[str, float]:
        """Return `<layer>/<site>/<metric>` for every site and metric; copies to the host once."""
        if not self._sums:
            return {}
        sums = torch.stack(list(self._sums.values())).cpu()
        return {
            f"{layer_site}/{metric}": value
            for layer_site, row in zip(self._sums, sums, strict=True)
            for metric, value in metrics(row).items()
        }

    def _sample(self, x: Tensor, share: TokenShare = WHOLE_ROWS) -> Tensor:
        """Evenly spaced tokens, centred, as `[at most num_tokens, channels]`; a view if whole."""
        rows = x.reshape(-1, x.shape[-1])
        sampled = self.sampled(rows.shape[0] * share.count)
        if share.count == 1:
            return rows[sampled]
        held = x.shape[-2]
        tokens = torch.arange(rows.shape[0] * share.count)[sampled]
        row, position = tokens // (held * share.count), tokens % (held * share.count)
        is_here = position // held == share.index
        index = row * held + position % held
        return rows[index[is_here].to(rows.device)]

    def _accumulate(self, layer_site: str, counts: Tensor, max_count: int | None) -> None:
        magnitudes = counts.abs_().reshape(-1)
        clipped = torch.zeros((), dtype=torch.int64, device=counts.device)
        if max_count is not None:
            clipped = (magnitudes > max_count).sum()
            magnitudes = magnitudes.clamp_(max=max_count)
        total = magnitudes.sum(dtype=torch.float64)
        # The second clamp catches NaN, whose conversion to an integer is undefined.
        bins = magnitudes.clamp_(max=NUM_BINS - 1).to(torch.int64).clamp_(0, NUM_BINS - 1)
        sums = torch.cat([_histogram(bins), torch.stack([total, clipped.to(torch.float64)])])
        previous = self._sums.get(layer_site)
        self._sums[layer_site] = sums if previous is None else previous + sums


def metrics(sums: Tensor) -> dict[str, float]:
    """Turn one site's sums `[NUM_BINS + 2]` into the metrics of this module."""
    histogram, total, clipped = sums[:NUM_BINS].double(), float(sums[-2]), float(sums[-1])
    num_values = float(histogram.sum())
    if not num_values:
        return dict.fromkeys(METRICS, float("nan"))
    magnitude = torch.arange(NUM_BINS)
    bits = (magnitude[:, None] >> torch.arange(NUM_STEPS)) & 1
    silent_windows = (bits.reshape(-1, NUM_WINDOWS, WINDOW_STEPS).sum(-1) == 0).sum(-1)
    mean_spikes = float(histogram @ bits.sum(-1).double()) / num_values
    return {
        "mean_count": total / num_values,
        "mean_spikes": mean_spikes,
        "firing_rate": mean_spikes / NUM_STEPS,
        "silent_share": float(histogram[0]) / num_values,
        "window_sparsity": float(histogram @ silent_windows.double()) / num_values / NUM_WINDOWS,
        "share_le_7": float(histogram[:8].sum()) / num_values,
        "clipped_share": clipped / num_values,
    }


def _histogram(bins: Tensor) -> Tensor:
    """Count each bin without a device synchronisation; integer adds, so any order is exact."""
    histogram = torch.zeros(NUM_BINS, dtype=torch.int64, device=bins.device)
    return histogram.scatter_add_(0, bins, torch.ones_like(bins)).to(torch.float64)
