"""Forward and backward over a step's microbatches, without and with a pipeline.

A runner accumulates gradients into the parameters of this rank and returns this rank's summed
losses. It knows neither other data-parallel ranks' losses nor the optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from models.lesson import Lesson
from models.model import Model
from models.sequence import SequenceContext
from parallel.config import Shard
from parallel.engine_protocol import Microbatch
from parallel.fully_sharded import begin_microbatch, release
from parallel.teacher import TeacherPart

if TYPE_CHECKING:
    from models.routing import Routing
    from models.spiking.neurons import Spikes


@dataclass(frozen=True, slots=True)
class Placed:
    """A microbatch on the device; `sequence` was counted on the CPU."""

    tokens: Tensor
    labels: Tensor
    sequence: SequenceContext

    @classmethod
    def on(cls, batch: Microbatch, device: torch.device) -> Placed:
        """Move a batch to the device; boundaries are counted on the CPU first."""
        sequence = SequenceContext.from_document_ids(batch.document_ids)
        moved = replace(
            sequence,
            positions=sequence.positions.to(device, non_blocking=True),
            document_ids=sequence.document_ids.to(device, non_blocking=True),
            cu_seqlens=sequence.cu_seqlens.to(device, non_blocking=True),
        )
        return cls(batch.tokens.to(device), batch.labels.to(device), moved)


@dataclass(frozen=True, slots=True)
class Work:
    """What a step's losses are divided by, how its neurons fire and its expert layers train."""

    num_targets: int
    spikes: Spikes | None
    routing: Routing | None = None


@dataclass(slots=True)
class Sums:
    """Losses summed over this rank's rows, float64: what other stages compute is 0 here."""

    loss: Tensor
    kl: Tensor
    hidden: Tensor

    @classmethod
    def zero(cls, device: torch.device) -> Sums:
        """Nothing yet."""
        zeros = torch.zeros(3, dtype=torch.float64, device=device)
        return cls(*zeros.unbind())

    def add(self, loss: Tensor | None, lesson: Lesson | None) -> None:
        """Add a microbatch."""
        if loss is not None:
            self.loss = self.loss + loss.detach()
        if lesson is not None:
            self.kl = self.kl + lesson.kl_sum
            self.hidden = self.hidden + lesson.hidden_sum

    def tolist(self) -> list[float]:
        """The three numbers, with one copy to the host."""
        values: list[float] = torch.stack([self.loss, self.kl, self.hidden]).tolist()
        return values


class Runner(Protocol):
    """How one rank works through microbatches."""

    def train(self, microbatches: Sequence[Microbatch], work: Work) -> Sums:
        """Accumulate gradients of all losses, summed, over `work.num_targets`."""

    def token_losses(self, batch: Microbatch, spikes: Spikes | None) -> Tensor:
        """Loss of each token `[rows, T]` on the device, without gradients, on every stage."""


class SequentialRunner:
    """One microbatch after the other through the whole model."""

    def __init__(
        self, model: Model, teacher: TeacherPart | None, *, shard: Shard, device: torch.device
    ) -> None:
        self._model, self._teacher = model, teacher
        self._shard, self._device = shard, device

    def train(self, microbatches: Sequence[Microbatch], work: Work) -> Sums:
        """See `Runner`."""
        sums = Sums.zero(self._device)
        for index, microbatch in enumerate(microbatches):
            is_last = index == len(microbatches) - 1
            begin_microbatch(self._model, shard=self._shard, is_last=is_last)
            placed = Placed.on(microbatch, self._device)
            lesson = self._lesson(placed, work)
            loss_sum = self._model(
                placed.tokens,
                placed.sequence,
                labels=placed.labels,
                spikes=work.spikes,
                routing=work.routing,
                lesson=lesson,
            )
            (loss_sum / work.num_targets).backward()
            sums.add(loss_sum, lesson)
        if self._teacher is not None:
            self._teacher.release()
        return sums

    def _lesson(self, placed: Placed, work: Work) -> Lesson | None:
        if self._teacher is None:
            return None
        shown = self._teacher.show(
            (placed.tokens,), placed.sequence, placed.labels, num_targets=work.num_targets
        )
        return shown.lesson

    def token_losses(self, batch: Microbatch, spikes: Spikes | None) -> Tensor:
        """See `Runner`."""
        placed = Placed.on(batch, self._device)
        losses = self._model.token_losses(
            placed.tokens, placed.sequence, placed.labels, spikes=spikes
        )
        release(self._model)
        assert isinstance(losses, Tensor)
        return losses
