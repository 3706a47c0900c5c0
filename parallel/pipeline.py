"""Pipeline stages and their schedules, on `torch.distributed.pipelining`.

torch sends activations and gradients between stages and orders the work; here the model is cut,
every stage finds its own labels and documents (microbatches travel as nothing but the residual
streams of `parallel.stage`), the loss stays inside the last stage, and gradients are sums. Shapes
are given, because torch would find them by one extra real forward pass, which counts spikes twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

from parallel.config import PipelineSchedule
from parallel.engine_protocol import Microbatch
from parallel.fully_sharded import release
from parallel.mesh import Mesh
from parallel.runner import Placed, Sums, Work
from parallel.stage import StageModel

if TYPE_CHECKING:
    from models.spiking.neurons import Spikes

SCHEDULES: dict[PipelineSchedule, Any] = {
    PipelineSchedule.gpipe: ScheduleGPipe,
    PipelineSchedule.one_f_one_b: Schedule1F1B,
    PipelineSchedule.interleaved: ScheduleInterleaved1F1B,
    PipelineSchedule.zero_bubble: ScheduleInterleavedZeroBubble,
}
ONE_STAGE_A_RANK = frozenset({PipelineSchedule.gpipe, PipelineSchedule.one_f_one_b})


class PipelineRunner:
    """Runs this rank's stages; `parallel.runner.Runner`.

    Args:
        stages: this rank's parts of the model, in order, after they were sharded.
        numbers: which stages of all they are.
        num_stages: of all ranks.
        schedule: order of microbatches.
        mesh: this rank's place.
        dtype: of the residual stream.
        token_shares: pieces that the stream's tokens are cut into (sequence parallelism).
    """

    def __init__(  # noqa: PLR0913 - everything that a schedule depends on
        self,
        stages: Sequence[StageModel],
        numbers: Sequence[int],
        *,
        num_stages: int,
        schedule: PipelineSchedule,
        mesh: Mesh,
        dtype: torch.dtype,
        token_shares: int = 1,
    ) -> None:
        self._stages, self._numbers, self._num_stages = stages, numbers, num_stages
        self._schedule, self._mesh = schedule, mesh
        self._dtype, self._token_shares = dtype, token_shares
        self._built: tuple[tuple[int, int, int], Any] | None = None

    def train(self, microbatches: Sequence[Microbatch], work: Work) -> Sums:
        """See `parallel.runner.Runner`."""
        placed = [Placed.on(microbatch, self._mesh.device) for microbatch in microbatches]
        schedule = self._schedule_for(placed)
        sums = Sums.zero(self._mesh.device)
        for stage in self._stages:
            stage.begin(placed, work, sums)
        inputs = [torch.cat([p.tokens for p in placed])] if self._numbers[0] == 0 else []
        # The loss function is given a target for each microbatch; the stage has its own.
        target = torch.zeros(len(placed), device=self._mesh.device)
        schedule.step(*inputs, target=target, return_outputs=False)
        for stage in self._stages:
            stage.end()
        return sums

    @torch.no_grad()
    def token_losses(self, batch: Microbatch, spikes: Spikes | None) -> Tensor:
        """See `parallel.runner.Runner`. One microbatch at a time: each stage waits for the last."""
        placed = Placed.on(batch, self._mesh.device)
        losses = torch.zeros(placed.labels.shape, device=self._mesh.device)
        for stage, number in zip(self._stages, self._numbers, strict=True):
            x, *sinks = [placed.tokens] if number == 0 else self._receive(placed, stage, number - 1)
            out = stage.token_losses(
                x, placed.sequence, placed.labels, sinks=sinks[0] if sinks else None, spikes=spikes
            )
            release(stage)
            if isinstance(out, Tensor) and number == self._num_stages - 1:
                losses = out
                continue
            for stream in (out,) if isinstance(out, Tensor) else out:
                dist.send(stream, self._peer(number + 1), group=self._mesh.pp_group)
        last = self._peer(self._num_stages - 1)
        losses = losses.to(torch.promote_types(self._dtype, torch.float32))
        dist.broadcast(losses, last, group=self._mesh.pp_group)
        return losses

    def _receive(self, placed: Placed, stage: StageModel, number: int) -> list[Tensor]:
        """The student's streams from another stage."""
        streams = []
        for shape in stage.own_streams(placed.tokens, self._token_shares):
            stream = torch.empty(shape, dtype=self._dtype, device=self._mesh.device)
            dist.recv(stream, self._peer(number), group=self._mesh.pp_group)
            streams.append(stream)
        return streams

    def _peer(self, number: int) -> int:
        """The rank, of this rank's pipeline, that has a stage."""
        return dist.get_global_rank(self._mesh.pp_group, number % self._mesh.pp_size)

    def _schedule_for(self, placed: Sequence[Placed]) -> Any:
        """The schedule of this shape, built again when the shape changes."""
        shape = (len(placed), *placed[0].tokens.shape)
        if self._built is None or self._built[0] != shape:
            stages = [
                self._stage(stage, number, placed[0])
                for stage, number in zip(self._stages, self._numbers, strict=True)
            ]
            takes_one = self._schedule in ONE_STAGE_A_RANK
            schedule = SCHEDULES[self._schedule](
                stages[0] if takes_one else stages,
                n_microbatches=len(placed),
                loss_fn=lambda loss, _target: loss,
                scale_grads=False,
            )
            self._built = (shape, schedule)
        return self._built[1]

    def _stage(self, stage: StageModel, number: int, placed: Placed) -> PipelineStage:
        streams = tuple(
            torch.empty(shape, dtype=self._dtype, device="meta", requires_grad=True)
            for shape in stage.all_streams(placed.tokens, self._token_shares)
        )
        loss = torch.empty(
            (), dtype=torch.promote_types(self._dtype, torch.float32), device="meta",
            requires_grad=True,
        )  # fmt: skip
        tokens = torch.empty_like(placed.tokens, device="meta")
        return PipelineStage(
            stage,
            number,
            self._num_stages,
            self._mesh.device,
            input_args=(tokens,) if number == 0 else streams,
            output_args=(loss,) if stage.part.has_head else streams,
            group=self._mesh.pp_group,
        )
