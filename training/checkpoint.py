"""When a checkpoint is written, what its manifest says, and what a resumed run must agree with.

The policy only: bytes, atomicity, hashes and boxes are `parallel.checkpoint`'s.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.prepared import TOKENIZER_FOLDER
from data.tokenizer import Tokenizer
from parallel import checkpoint
from parallel.boxes import Box
from parallel.checkpoint_writer import CheckpointWriter, Snapshot
from parallel.engine_protocol import Engine
from parallel.mesh import Mesh
from training.config import CheckpointConfig, RunConfig
from training.resolved_config import config_hash, plain
from training.stage_data import RunData
from training.stages import Stage, StagePlan
from training.state import TrainState, chain

if TYPE_CHECKING:
    from training.origin import Origin
    from training.weight_source import WeightSource

logger = logging.getLogger(__name__)

MODEL = "model/"
OPTIMIZER = "optimizer/"
LIBRARIES = ("synfire", "torch", "megatron-core", "numpy", "sentencepiece", "tokenizers")


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """Writes the checkpoints of one run.

    `facts` are the manifest's entries that never change. Without a `writer` every save holds
    training until it is on the disk.
    """

    run_dir: Path
    config: CheckpointConfig
    engine: Engine
    mesh: Mesh
    tokenizer: Tokenizer
    facts: Mapping[str, Any]
    writer: CheckpointWriter | None = None

    @classmethod
    def open(
        cls,
        config: RunConfig,
        facts: Mapping[str, Any],
        tokenizer: Tokenizer,
        engine: Engine,
        mesh: Mesh,
    ) -> Checkpoints:
        """The checkpoints of a run; `facts` are `manifest_facts`. Collective."""
        return cls(
            run_dir=Path(config.run_dir),
            config=config.checkpoint,
            engine=engine,
            mesh=mesh,
            tokenizer=tokenizer,
            facts=facts,
            writer=CheckpointWriter(mesh) if config.checkpoint.asynchronous else None,
        )

    @property
    def is_writing(self) -> bool:
        """Whether this rank writes in the background; ranks agree before they act on it."""
        return self.writer is not None and self.writer.is_writing

    def is_due(self, step: int) -> bool:
        """Whether the interval asks for a checkpoint after this step."""
        interval = self.config.interval_steps
        return interval > 0 and step % interval == 0

    def take(self) -> Snapshot | None:
        """Copy what a checkpoint holds, for a save in the background; None if there is none.

        Collective. Waits for the save before.

        Raises:
            CheckpointError: the save before could not be written.
        """
        return None if self.writer is None else self.writer.take(tensors(self.engine))

    def save(self, state: TrainState, stage: Stage, snapshot: Snapshot | None = None) -> None:
        """Write weights, optimizer state and manifest, then drop old checkpoints. Collective.

        A snapshot, taken since the last update, is written in the background.

        Raises:
            CheckpointError: it could not be written; older checkpoints are untouched. What fails in
                the background is raised by the next `finish` or `take`.
        """
        directory = checkpoint.step_directory(self.run_dir, state.step)
        manifest = {
            **self.facts,
            **state.to_manifest(),
            "stage": stage.name,
            "stage_step": state.step - stage.first_step,
            "num_updates": self.engine.num_updates,
        }
        if snapshot is None or self.writer is None:
            self._write(directory, tensors(self.engine), manifest, self.mesh)
            return
        logger.info("held training for %.2f s to copy step %d", snapshot.stall_seconds, state.step)
        boxes = snapshot.boxes
        self.writer.start(directory, lambda mesh: self._write(directory, boxes, manifest, mesh))

    def finish(self) -> None:
        """Wait for what is being written in the background, if anything is. Collective.

        Raises:
            CheckpointError: it could not be written, on every rank alike.
        """
        if self.writer is not None:
            self.writer.finish()

    def close(self) -> None:
        """After an error: let what this rank writes come to its end."""
        if self.writer is not None:
            self.writer.close()

    def _write(
        self, directory: Path, boxes: Mapping[str, Box], manifest: Mapping[str, Any], mesh: Mesh
    ) -> None:
        started = time.perf_counter()
        checkpoint.save(
            directory,
            boxes,
            manifest,
            mesh=mesh,
            add_files=lambda folder: self.tokenizer.copy_to(folder / TOKENIZER_FOLDER),
        )
        mesh.agree("removing old checkpoints", self._prune)
        logger.info("saved %s in %.2f s", directory, time.perf_counter() - started)

    def _prune(self) -> None:
        if self.mesh.is_main:
            checkpoint.prune(
                self.run_dir,
                keep_last=self.config.keep_last,
                keep_every_steps=self.config.keep_every_steps,
            )


def load_everything(
    engine: Engine, directory: Path, manifest: Mapping[str, Any], mesh: Mesh
) -> None:
    """Fill the engine with weights and optimizer state of a verified checkpoint. Collective.

    Raises:
        CheckpointError: another model, or an optimizer state that the checkpoint does not have.
    """
    checkpoint.load(directory, tensors(engine), mesh=mesh, is_verified=True)
    engine.num_updates = int(manifest["num_updates"])


def tensors(engine: Engine) -> dict[str, Box]:
    """Everything that is saved: `model/<name>` and `optimizer/<state>/<name>`."""
    return {
        **{MODEL + name: box for name, box in engine.parameters.items()},
        **{OPTIMIZER + name: box for name, box in engine.optimizer_state().items()},
    }


def manifest_facts(
    config: RunConfig, data: RunData, origin: Origin, teacher: WeightSource | None
) -> dict[str, Any]:
    """The manifest's entries that are the same in every checkpoint of a run."""
    resolved = plain(config)
    return {
        "model": resolved["model"],
        "spiking": resolved["spiking"],
        "pattern": config.model.layers.describe(),
        "seed": config.seed,
        "tokenizer": {
            "sha256": data.tokenizer.sha256,
            "vocab_size": data.tokenizer.vocab_size,
            "eos_token_id": data.tokenizer.eos_token_id,
        },
        "data": data.fingerprints(),
        "config_hash": config_hash(resolved),
        "new_parameters": list(origin.new_parameters),
        "weights": origin.weights,
        "teacher": None if teacher is None else teacher.identity(),
        "wandb_run_id": origin.run_id,
        "versions": library_versions(),
    }


def library_versions() -> dict[str, str]:
    """Versions of what decides the numbers; a library that is not installed is left out."""
    found: dict[str, str] = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def check_resumable(
    manifest: Mapping[str, Any], state: TrainState, plan: StagePlan, data: RunData
) -> None:
    """Refuse to go on with other stages or other data than the checkpoint was trained on.

    Raises:
        ValueError: naming what differs and both values.
    """
    stage = plan.stage_of(max(0, state.step - 1))
    here = (stage.name, state.step - stage.first_step)
    there = (str(manifest["stage"]), int(manifest["stage_step"]))
    if here != there:
        raise ValueError(
            f"stages (step {state.step} is {here[0]} at {here[1]}) must put the checkpoint's step "
            f"where it was: got {there[0]} at {there[1]}. Keep the finished stages as they were, "
            "or start a fresh run_dir with init.checkpoint=DIR."
        )
    recorded = str(dict(manifest["data"]).get(stage.name))
    found = data.fingerprints()[stage.name]
    if recorded != found:
        raise ValueError(
            f"data of stage {stage.name} (fingerprint {found[:12]}) must be the checkpoint's: got "
            f"{recorded[:12]}. Restore the prepared folder, its weight, sequence_length and "
            "global_batch_tokens, or start a fresh run_dir with init.checkpoint=DIR."
        )
    expected = chain(state.sample_hash_before, data.sample_ids(stage, state.step - 1))
    if state.step > 0 and expected != state.sample_hash:
        raise ValueError(
            f"sample_hash of step {state.step} ({expected}) must be the checkpoint's: got "
            f"{state.sample_hash}. The order of samples has changed since; go on with the release "
            "that wrote the checkpoint, or start a fresh run_dir with init.checkpoint=DIR."
        )
