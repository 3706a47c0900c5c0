"""One optimizer step in verbs: agree over ranks, forward and backward, update, describe.

Owns the order of what happens inside a step and the numbers that describe it. The mechanism
(sharding, precision, the optimizer) is the engine's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from models.config import SpikingConfig
from models.cost import mean_visible
from models.sequence import SequenceContext
from models.spiking.recorder import SpikeRecorder
from models.spiking.schedule import spikes_at
from parallel.engine_protocol import Engine, Microbatch
from parallel.gradients import NonFiniteError
from training.health import diverged
from training.metrics import Throughput, Visible
from training.microbatch import microbatches
from training.stages import Stage
from training.state import TrainState


@dataclass(frozen=True, slots=True)
class Agreement:
    """What all ranks know together before the first backward of a step."""

    num_targets: int
    visible: Visible
    is_stop_requested: bool
    is_saving: bool


@dataclass(frozen=True, slots=True)
class Work:
    """What one step works on: this rank's rows, the ids of all ranks' rows, when it began."""

    rows: Microbatch
    sample_ids: tuple[object, ...]
    agreement: Agreement
    started: float


@dataclass(frozen=True, slots=True)
class Stepper:
    """Runs steps on one engine; holds no progress of its own."""

    engine: Engine
    spiking: SpikingConfig
    throughput: Throughput
    window_tokens: int | None
    microbatch_rows: int
    memory_bytes: Callable[[], int | None]
    clock: Callable[[], float] = time.perf_counter

    def agree(self, rows: Microbatch, *, stop: bool, saving: bool) -> Agreement:
        """Sum this rank's counts over all ranks; collective.

        Whether any rank was asked to stop, or still writes a checkpoint, is told in the same call.
        """
        lengths = SequenceContext.from_document_ids(rows.document_ids).lengths
        tokens = rows.tokens.numel()
        full = mean_visible(lengths) * tokens
        window = mean_visible(lengths, self.window_tokens) * tokens
        counts = [float((rows.labels >= 0).sum()), full, window]
        total, (must_stop, is_saving) = self.engine.agree(
            torch.tensor(counts, dtype=torch.float64), (stop, saving)
        )
        visible = Visible(*total[1:].tolist())
        return Agreement(round(float(total[0])), visible, must_stop, is_saving=is_saving)

    def step(
        self, state: TrainState, stage: Stage, work: Work
    ) -> tuple[TrainState, dict[str, Any]]:
        """Update the model on this rank's rows. Collective.

        Returns the state after the step and its `metrics.jsonl` row, equal on all ranks except for
        time and memory.

        Raises:
            TrainingDivergedError: a loss or gradient that is not finite; nothing was updated.
        """
        recorder = self._recorder(state.step)
        lr = stage.learning_rate(state.step)
        try:
            losses = self.engine.forward_backward(
                list(microbatches(work.rows, self.microbatch_rows)),
                num_targets=work.agreement.num_targets,
                spikes=spikes_at(self.spiking, state.step, recorder),
            )
            grad_norm = self.engine.clip_and_step(lr)
        except NonFiniteError as error:
            raise diverged(
                error, step=state.step + 1, stage=stage.name, sample_ids=work.sample_ids
            ) from error
        tokens = stage.config.global_batch_tokens
        microbatch_tokens = self.microbatch_rows * work.rows.tokens.shape[1]
        after = state.advance(sample_ids=work.sample_ids, tokens=tokens)
        statistics = self._spike_statistics(recorder)
        seconds = self.clock() - work.started
        return after, {
            "step": after.step,
            "tokens": after.tokens,
            "loss": losses.pop("loss"),
            "grad_norm": grad_norm,
            "lr": lr,
            **self.throughput.row(
                tokens, seconds, work.agreement.visible, microbatch_tokens=microbatch_tokens
            ),
            "memory_bytes": self.memory_bytes(),
            "sample_hash": after.sample_hash,
            **losses,
            **(self.engine.expert_loads() if self._is_due(state.step) else {}),
            **statistics,
            "stage": stage.name,
        }

    def _recorder(self, step: int) -> SpikeRecorder | None:
        """A recorder on the first spiking step and every `statistics_interval_steps`-th one."""
        is_due = self._is_due(step, first=self.spiking.start_step)
        if not is_due or spikes_at(self.spiking, step) is None:
            return None
        return SpikeRecorder(self.spiking.statistics_tokens)

    def _is_due(self, step: int, *, first: int = 0) -> bool:
        """Whether statistics are too long for the rows of most steps, but not of this one."""
        interval = self.spiking.statistics_interval_steps
        return interval > 0 and ((step + 1) % interval == 0 or step == first)

    def _spike_statistics(self, recorder: SpikeRecorder | None) -> dict[str, float]:
        """Statistics of all ranks as `spike/<layer>/<site>/<metric>`. Collective when recorded."""
        if recorder is None:
            return {}
        recorder.load(self.engine.sum_by_name(recorder.tensors()))
        return {f"spike/{name}": value for name, value in recorder.summary().items()}
