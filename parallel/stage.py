"""A pipeline stage as torch's pipelining calls it: streams in, streams or the loss out.

In this order: the residual stream `[B, T, D]`, that of sinks `[1, S, D]` where the model has them,
and with a teacher the same of it. Where ranks share out tokens, of each stream's tokens. Every
stream gets a gradient, if only of zeros, which the stage before waits for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from models.attached_loss import answer
from models.config import ModelConfig
from models.model import Model
from parallel.runner import Placed, Sums, Work
from parallel.teacher import TeacherPart

Shape = tuple[int, int, int]


class StageModel(Model):
    """A part of the model that finds what belongs to a microbatch itself.

    Microbatches pass a stage in order, once each, so that a counter is enough.
    """

    teacher: TeacherPart | None = None
    _microbatches: Sequence[Placed] = ()
    _work: Work | None = None
    _next = 0

    def begin(self, microbatches: Sequence[Placed], work: Work, sums: Sums) -> None:
        """Say what the coming step works on and where its losses are added up."""
        self._microbatches, self._work, self._next = microbatches, work, 0
        self._sums = sums

    def end(self) -> None:
        """Forget the step."""
        count, self._microbatches, self._work = len(self._microbatches), (), None
        assert self._next == count, f"{self._next} forward passes for {count} microbatches"
        if self.teacher is not None:
            self.teacher.release()

    def forward(self, *streams: Tensor) -> Tensor | tuple[Tensor, ...]:  # type: ignore[override]
        """Tokens or streams to streams, or to the loss over all targets."""
        assert self._work is not None, "begin comes first"
        placed = self._microbatches[self._next]
        self._next += 1
        own, taught = streams, streams
        if not self.part.has_embedding:
            own, taught = streams[: self._num_own], streams[self._num_own :]
        shown = None
        if self.teacher is not None:
            shown = self.teacher.show(
                taught, placed.sequence, placed.labels, num_targets=self._work.num_targets
            )
        lesson = None if shown is None else shown.lesson
        out = super().forward(
            own[0],
            placed.sequence,
            sinks=own[1] if len(own) > 1 else None,
            labels=placed.labels,
            spikes=self._work.spikes,
            routing=self._work.routing,
            lesson=lesson,
        )
        first, *rest = (out,) if isinstance(out, Tensor) else out
        self._sums.add(first if self.part.has_head else None, lesson)
        if self.part.has_head:
            first = first / self._work.num_targets
        elif shown is not None:
            rest += shown.streams
        if not self.part.has_embedding:
            first = answer(first, *(streams if self.part.has_head else taught))
        # A stage with nothing to train still has to answer with a gradient.
        outputs = tuple(x if x.requires_grad else x.requires_grad_() for x in (first, *rest))
        return outputs if rest else outputs[0]

    def own_streams(self, tokens: Tensor, token_shares: int) -> Iterator[Shape]:
        """Shapes of the student's streams for tokens `[B, T]`, shared out over so many ranks."""
        return _shapes(self.config, tokens, token_shares)

    def all_streams(self, tokens: Tensor, token_shares: int) -> Iterator[Shape]:
        """The same and the teacher's."""
        yield from self.own_streams(tokens, token_shares)
        if self.teacher is not None:
            yield from _shapes(self.teacher.model.config, tokens, token_shares)

    @property
    def _num_own(self) -> int:
        return 2 if self.config.uses_sinks else 1


def _shapes(config: ModelConfig, tokens: Tensor, token_shares: int) -> Iterator[Shape]:
    yield tokens.shape[0], tokens.shape[1] // token_shares, config.hidden_size
    if config.uses_sinks:
        yield 1, config.sinks.num_tokens // token_shares, config.hidden_size
