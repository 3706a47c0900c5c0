"""`python -m launch.train`: continual pretraining of one experiment, on one process or many."""

from __future__ import annotations

from typing import Any

from launch.checkpoints import checkpoint_model
from launch.compose import command
from training.config import RunConfig
from training.run import run


def model_from_checkpoint(raw: dict[str, Any]) -> dict[str, Any]:
    """With `model=from_checkpoint` the model is the one of `init.checkpoint`."""
    source = raw["init"]["checkpoint"]
    if source is not None and "vocab_size" not in raw["model"]:
        return {**raw, "model": checkpoint_model(source)}
    return raw


@command("train", RunConfig, resolve=model_from_checkpoint)
def main(config: RunConfig) -> None:
    """Continual pretraining through the stages of an experiment.

    The same command again resumes from the newest complete checkpoint of run_dir. Many processes:
    torchrun --nproc-per-node N -m launch.train key=value ...
    """
    run(config)


if __name__ == "__main__":
    main()
