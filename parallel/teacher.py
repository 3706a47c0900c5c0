"""A frozen teacher beside the student: cut, sharded and run like it, never trained.

Its parameters have no gradients and no optimizer state. Under a pipeline the teacher's residual
streams travel with the student's (`parallel.stage`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.config import ModelConfig
from models.layers import Head
from models.lesson import Goals, Lesson
from models.model import Model
from models.sequence import SequenceContext
from models.spiking.channels import TokenShare
from parallel.boxes import Box
from parallel.fully_sharded import release


@dataclass(frozen=True, slots=True)
class TeacherSpec:
    """Which model teaches, and what. `offload` keeps its weights on the host between uses."""

    config: ModelConfig
    goals: Goals
    offload: bool = False


@dataclass(frozen=True, slots=True)
class Shown:
    """A part's answer to one microbatch: the streams it hands on, and the lesson of its layers."""

    streams: tuple[Tensor, ...]
    lesson: Lesson


class TeacherPart:
    """The teacher's layers beside one part of the student."""

    def __init__(self, model: Model, goals: Goals, share: TokenShare) -> None:
        self.model = model
        self._goals, self._share = goals, share

    @torch.no_grad()
    def show(
        self,
        inputs: tuple[Tensor, ...],
        sequence: SequenceContext,
        labels: Tensor,
        *,
        num_targets: int,
    ) -> Shown:
        """Run tokens, or the teacher's stream and that of its sinks, through this part."""
        streams: dict[int, Tensor] = {}

        def keep(layer: int, stream: Tensor) -> Tensor:
            streams[layer] = stream
            return stream

        wants_streams = self._goals.hidden > 0
        out, sinks = self.model.streams(
            inputs[0],
            sequence,
            sinks=inputs[1] if len(inputs) > 1 else None,
            observe=keep if wants_streams else None,
        )
        head = None
        if self._goals.kl > 0 and isinstance(self.model.head, Head):
            head = (self.model.head.enter(out), self.model.head_weight)
        lesson = Lesson(
            self._goals, labels, streams, share=self._share, head=head, scale=1 / num_targets
        )
        handed_on = tuple(x.detach() for x in (out, sinks) if x is not None)
        return Shown(handed_on, lesson)

    def release(self) -> None:
        """Give up gathered weights."""
        release(self.model)


@dataclass(frozen=True, slots=True)
class Teacher:
    """The parts beside those of the student, and this rank's part of their parameters.

    `parameters` are to be filled by whoever loads the weights.
    """

    parts: Sequence[TeacherPart]
    parameters: Mapping[str, Box]


def check_teacher(teacher: ModelConfig, student: ModelConfig, goals: Goals, *, pp: int) -> None:
    """Refuse a teacher that the student cannot learn from.

    Raises:
        ValueError: naming the setting and both numbers.
    """
    needed = {"vocab_size": "its distributions are over the student's tokens"}
    if goals.hidden > 0:
        needed["hidden_size"] = "distill.hidden compares residual streams"
        needed["num_hidden_layers"] = "distill.hidden compares them layer by layer"
    if pp > 1:
        needed["num_hidden_layers"] = "a pipeline cuts both models alike"
    for name, reason in needed.items():
        ours, theirs = getattr(student, name), getattr(teacher, name)
        if ours != theirs:
            raise ValueError(
                f"training.teacher ({name} {theirs}) must have the student's {name}, because "
                f"{reason}: got {ours}. Choose another teacher"
                f"{', or distill.hidden=0' if 'distill' in reason else ''}"
                f"{', or parallel.pp=1' if 'pipeline' in reason else ''}."
            )
