"""`python -m launch.train`: continual pretraining of one experiment, on one process or many."""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from launch.checkpoints import checkpoint_model
from launch.compose import command, leave
from models.config import ModelConfig
from training.config import RunConfig
from training.run import run

REQUIRED = frozenset(
    each.name
    for each in fields(ModelConfig)
    if each.default is MISSING and each.default_factory is MISSING
)
"""Keys of a model that have no default, so that a model given by hand has some of them."""


def model_from_checkpoint(raw: dict[str, Any]) -> dict[str, Any]:
    """With `model=from_checkpoint` the model is the one of `init.checkpoint`.

    A run that has checkpoints of its own no longer needs it: where it is gone, they tell the model.

    Raises:
        ValueError: there is no `init.checkpoint`.
    """
    source, given = raw["init"]["checkpoint"], REQUIRED.intersection(raw["model"])
    if "vocab_size" in given:
        return raw
    if source is None:
        if given:
            return raw
        raise ValueError(
            "init.checkpoint (null) must be a checkpoint for model=from_checkpoint. Add "
            "init.checkpoint=FOLDER, or choose another model=."
        )
    own = Path(str(raw.get("run_dir")))
    is_own = not Path(source).exists() and (own / "checkpoints").is_dir()
    return {**raw, "model": checkpoint_model(own if is_own else source)}


@command("train", RunConfig, resolve=model_from_checkpoint)
def main(config: RunConfig) -> None:
    """Continual pretraining through the stages of an experiment.

    The same command again resumes from the newest complete checkpoint of run_dir. Many processes:
    torchrun --nproc-per-node N -m launch.train key=value ... Asked to stop (SIGTERM, SIGUSR1) a run
    saves, says so in run_dir/stopped.json and ends with status 0.
    """
    if not run(config):
        leave(0)
        # A sweep would go on to its next job.
        raise SystemExit(0)


if __name__ == "__main__":
    main()
