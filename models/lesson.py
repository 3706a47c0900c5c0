"""What a frozen teacher showed for one microbatch, and how a student's loss uses it.

What is learned enters the gradient where it arises (`models.attached_loss`), and the loss that is
reported stays the cross entropy. Knows no ranks; `parallel.teacher` runs the teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from models.attached_loss import attach
from models.distillation import hidden_mse
from models.spiking.channels import TokenShare


@dataclass(frozen=True, slots=True)
class Goals:
    """Weights of what is learned from a teacher beside the cross entropy, 0 for nothing."""

    kl: float
    hidden: float
    temperature: float


class Lesson:
    """One microbatch, as the teacher sees it; adds up what the student's differs by.

    No dataclass: of those among a forward's arguments FSDP's mixed precision makes copies, whose
    floating-point tensors are cast, and sums would be lost in them.

    Args:
        goals: what counts how much.
        labels: `[B, T]`; masked tokens teach nothing.
        streams: the teacher's residual stream `[B, T, D]` after each layer of this part, by layer
            (empty without `goals.hidden`); this rank's tokens of it.
        share: which tokens of the rows the residual stream holds.
        head: the teacher's final-normed hidden states and its head's weight, on a part with the
            head (with `goals.kl`).
        scale: what the sum of all losses is multiplied by (1 / number of targets).
    """

    def __init__(
        self,
        goals: Goals,
        labels: Tensor,
        streams: Mapping[int, Tensor],
        *,
        share: TokenShare,
        head: tuple[Tensor, Tensor] | None,
        scale: float,
    ) -> None:
        self.goals, self.head = goals, head
        self._labels, self._streams, self._share, self._scale = labels, streams, share, scale
        self.hidden_sum = torch.zeros((), dtype=torch.float64, device=labels.device)
        self.kl_sum = torch.zeros_like(self.hidden_sum)

    def compare(self, layer: int, stream: Tensor) -> Tensor:
        """The student's stream after a layer, now with the gradient of its difference."""
        if not self._streams:
            return stream
        count = self._labels.shape[1] // self._share.count
        labels = self._labels.narrow(1, self._share.index * count, count)
        difference = hidden_mse(stream, self._streams[layer], labels)
        self.hidden_sum += difference.detach()
        return attach(stream, difference, self.goals.hidden * self._scale)

    def diverge(self, loss: Tensor, divergence: Tensor) -> Tensor:
        """The student's summed loss, now with the gradient of its divergence from the teacher."""
        self.kl_sum += divergence.detach()
        return attach(loss, divergence, self.goals.kl * self._scale)
