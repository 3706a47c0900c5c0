"""The loop: fetch, step, record, save, until the run is done or asked to stop.

Knows verbs, not mechanisms. All ranks go through it together; rank 0 writes and speaks.
"""

from __future__ import annotations

import logging
import time
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from parallel.mesh import Mesh
from training.checkpoint import Checkpoints
from training.health import FAILED, STOPPED, StopRequest, TrainingDivergedError, write_status
from training.heldout import HeldOut
from training.metrics import Sinks
from training.stage_data import RunData
from training.stages import Stage, StagePlan
from training.state import TrainState
from training.step import Stepper, Work

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Loop:
    """Everything a run needs after it has been set up."""

    mesh: Mesh
    plan: StagePlan
    data: RunData
    stepper: Stepper
    checkpoints: Checkpoints
    sinks: Sinks
    held_out: HeldOut
    stop: StopRequest

    def fit(self, state: TrainState) -> TrainState:
        """Train from `state` to the end of the plan, or to the step where a rank was asked to stop.

        Raises:
            TrainingDivergedError: a loss or gradient norm that is not finite.
            RankError: a row that could not be written.
            CheckpointError: a checkpoint that could not be written.
        """
        saved_step = state.step
        with self.stop as stop:
            while state.step < self.plan.total_steps:
                stage = self.plan.stage_of(state.step)
                reached, saved_step = self._run_stage(stage, state, saved_step, stop)
                if reached.step < stage.end_step:
                    self._leave(reached, stop, saved_step)
                    return reached
                state = reached
            self._save_last(state, saved_step)
        return state

    def _run_stage(
        self, stage: Stage, state: TrainState, saved_step: int, stop: StopRequest
    ) -> tuple[TrainState, int]:
        """The steps of one stage that are left; fewer when a stop was requested."""
        logger.info("stage %s from step %d", stage.name, state.step + 1)
        place = {"rank": self.mesh.dp_rank, "size": self.mesh.dp_size}
        with closing(self.data.stream(stage, state.step, **place)) as batches:
            while state.step < stage.end_step:
                started = time.perf_counter()
                batch = next(batches)
                must_stop = stop.reason is not None or self.sinks.problem is not None
                saving = self.checkpoints.is_writing
                agreement = self.stepper.agree(batch, stop=must_stop, saving=saving)
                if not agreement.is_saving:
                    self.checkpoints.finish()
                if agreement.is_stop_requested:
                    break
                sample_ids = self.data.sample_ids(stage, state.step)
                work = Work(batch, sample_ids, agreement, started)
                state = self._step(state, stage, work)
                if self.checkpoints.is_due(state.step):
                    saved_step = state.step
        return state, saved_step

    def _step(self, state: TrainState, stage: Stage, work: Work) -> TrainState:
        try:
            state, row = self.stepper.step(state, stage, work)
        except TrainingDivergedError as error:
            self._note_failure(state, stage, work, error)
            raise
        if not self.checkpoints.is_due(state.step):
            self._record(row, stage, state.step)
            return state
        snapshot = self.checkpoints.take()
        if snapshot is not None:
            row["checkpoint/stall_seconds"] = snapshot.stall_seconds
        self._record(row, stage, state.step)
        self._agree_on_rows()
        self.checkpoints.save(state, stage, snapshot)
        return state

    def _record(self, row: dict[str, Any], stage: Stage, step: int) -> None:
        self.sinks.step(row)
        if self.held_out.is_due(step, total_steps=self.plan.total_steps):
            self.sinks.evaluation(self.held_out.evaluate(stage, step))

    def _save_last(self, state: TrainState, saved_step: int) -> None:
        """Finish what is being written, and save unless this step is."""
        self.checkpoints.finish()
        if state.step > saved_step:
            self._agree_on_rows()
            self.checkpoints.save(state, self.plan.stage_of(state.step - 1))

    def _agree_on_rows(self) -> None:
        """No rank goes on when a row is not on the disk."""
        action = f"writing rows to {self.checkpoints.run_dir} (free space and run again)"
        self.mesh.agree(action, self.sinks.sync)

    def _leave(self, state: TrainState, stop: StopRequest, saved_step: int) -> None:
        """Save and say why the run ends early."""
        self._agree_on_rows()
        self._save_last(state, saved_step)
        stage = self.plan.stage_of(max(0, state.step - 1))
        reasons = [reason for reason in self.mesh.gather(stop.reason) if reason is not None]
        logger.info("stopped by %s after step %d; the same command goes on", reasons[0], state.step)
        if self.mesh.is_main:
            status = {"reason": reasons[0], "step": state.step, "stage": stage.name}
            write_status(self.checkpoints.run_dir, STOPPED, status)

    def _note_failure(
        self, state: TrainState, stage: Stage, work: Work, error: TrainingDivergedError
    ) -> None:
        if self.mesh.is_main:
            status = {
                "error": str(error),
                "step": state.step + 1,
                "stage": stage.name,
                "sample_ids": [str(sample) for sample in work.sample_ids],
            }
            write_status(self.checkpoints.run_dir, FAILED, status)
