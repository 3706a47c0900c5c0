"""Spike codes: integer counts spread over time steps, exactly (report, section 3.3.2, equation 23).

A code expands counts into T planes of spikes with one integer weight a step, so that
`sum_t weights[t] * planes[t] == counts`. T belongs to a whole tensor: the value that needs most
steps decides. With m = max |count|:

| code | alphabet | T | weights, first step first |
| --- | --- | --- | --- |
| binary | 0, 1 | max(m, 1) | 1 |
| ternary | -1, 0, 1 | max(m, 1) | 1 |
| bitwise | 0, 1 | max(bits(m), 1) | 2^(T-1) ... 2, 1 |
| bitwise_bidirectional | -1, 0, 1 | max(bits(m), 1) | 2^(T-1) ... 2, 1; sign on every bit |
| bitwise_twos_complement | 0, 1 | max(bits(m) + 1, 2) | -2^(T-1), 2^(T-2) ... 2, 1 |

bits(m) = ceil(log2(m + 1)); the most significant bit comes first. `binary` and `bitwise` take no
negative counts: `shift_to_unsigned` first, and add its zero point back after decoding.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor


class SpikeCode(Enum):
    """How a count becomes a spike train."""

    binary = "binary"
    ternary = "ternary"
    bitwise = "bitwise"
    bitwise_bidirectional = "bitwise_bidirectional"
    bitwise_twos_complement = "bitwise_twos_complement"


UNSIGNED = (SpikeCode.binary, SpikeCode.bitwise)
RATE = (SpikeCode.binary, SpikeCode.ternary)


@dataclass(frozen=True, slots=True)
class SpikeTrain:
    """Spikes `planes` `[T, ...]` (int8, in -1, 0, 1) and their `weights` `[T]` (int64)."""

    planes: Tensor
    weights: Tensor

    def decode(self) -> Tensor:
        """The counts `[...]` as int64, exactly those that were expanded."""
        return torch.einsum("t,t...->...", self.weights, self.planes.to(torch.int64))

    def firing_rate(self) -> float:
        """Share of (step, value) pairs that carry a spike: sparsity definition "per-step"."""
        return float(self.planes.abs().double().mean())

    def mean_spikes(self) -> float:
        """Spikes a value emits over all steps, on average."""
        return self.firing_rate() * self.planes.shape[0]

    def window_sparsity(self, window_steps: int = 3) -> float:
        """Share of all-zero windows; T is first padded with silent leading steps."""
        missing = -self.planes.shape[0] % window_steps
        silent = self.planes.new_zeros(missing, *self.planes.shape[1:])
        padded = torch.cat([silent, self.planes])
        windows = padded.reshape(-1, window_steps, *self.planes.shape[1:])
        return float((windows == 0).all(dim=1).double().mean())


def num_steps(counts: Tensor, code: SpikeCode) -> int:
    """Return T for whole-number counts of any shape (see the table of this module)."""
    return _num_steps(int(counts.abs().max()) if counts.numel() else 0, code)


def expand(counts: Tensor, code: SpikeCode, *, num_steps: int | None = None) -> SpikeTrain:
    """Expand whole-number counts `[...]` over `num_steps` steps (null: as many as they need).

    Raises:
        ValueError: fractions, negative counts under an unsigned code, or too few steps.
    """
    whole = counts.to(torch.int64)
    if counts.is_floating_point() and not bool((whole == counts).all()):
        raise ValueError("counts must be whole numbers: got fractions. Pass the neuron's counts.")
    low, high = (int(whole.min()), int(whole.max())) if whole.numel() else (0, 0)
    if code in UNSIGNED and low < 0:
        raise ValueError(
            f"counts (code {code.value}) must be at least 0: got {low}. "
            f"Use a signed code, or shift_to_unsigned first."
        )
    steps = _num_steps(max(-low, high), code) if num_steps is None else num_steps
    least, most = _range(steps, code)
    if low < least or high > most:
        raise ValueError(
            f"num_steps ({steps}) must cover counts {low} to {high} in code {code.value}: "
            f"got {least} to {most}. Raise num_steps."
        )
    if code in RATE:
        return _rate_train(whole, steps)
    return _bit_train(whole, steps, code)


def shift_to_unsigned(counts: Tensor) -> tuple[Tensor, int]:
    """Return counts minus a zero point, and that zero point: the minimum, 0 if none is negative."""
    zero_point = min(0, int(counts.min())) if counts.numel() else 0
    return counts - zero_point, zero_point


def _num_steps(most: int, code: SpikeCode) -> int:
    if code in RATE:
        return max(most, 1)
    if code is SpikeCode.bitwise_twos_complement:
        return max(most.bit_length() + 1, 2)
    return max(most.bit_length(), 1)


def _range(steps: int, code: SpikeCode) -> tuple[int, int]:
    """Least and greatest count that a code holds in `steps` steps."""
    if code is SpikeCode.bitwise_twos_complement:
        return -(1 << max(steps - 1, 0)), (1 << max(steps - 1, 0)) - 1
    most = steps if code in RATE else (1 << steps) - 1
    return (0 if code in UNSIGNED else -most), most


def _per_step(values: Tensor, like: Tensor) -> Tensor:
    """View `[T]` so that it broadcasts over `[T, *like.shape]`."""
    return values.reshape(-1, *([1] * like.dim()))


def _rate_train(counts: Tensor, steps: int) -> SpikeTrain:
    """The first |count| steps fire, with the sign of the count."""
    step = torch.arange(steps, device=counts.device)
    fires = counts.abs() > _per_step(step, counts)
    return SpikeTrain(planes=(fires * counts.sign()).to(torch.int8), weights=torch.ones_like(step))


def _bit_train(counts: Tensor, steps: int, code: SpikeCode) -> SpikeTrain:
    """Bits, most significant first; signed by value (bidirectional) or by weight (complement)."""
    shift = torch.arange(steps - 1, -1, -1, device=counts.device)
    weights = torch.ones_like(shift) << shift
    if code is SpikeCode.bitwise_twos_complement:
        weights[0] = -weights[0]
        return SpikeTrain(((counts >> _per_step(shift, counts)) & 1).to(torch.int8), weights)
    bits = (counts.abs() >> _per_step(shift, counts)) & 1
    return SpikeTrain((bits * counts.sign()).to(torch.int8), weights)
