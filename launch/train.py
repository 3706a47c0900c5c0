"""`python -m launch.train`: continual pretraining of one experiment, on one process or many."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launch.checkpoints import checkpoint_model
from launch.compose import command, leave
from training.config import RunConfig
from training.run import run


def model_from_checkpoint(raw: dict[str, Any]) -> dict[str, Any]:
    """With `model=from_checkpoint` the model is the one of `init.checkpoint`.

    A run that has checkpoints of its own no longer needs it: where it is gone, they tell the model.
    """
    source = raw["init"]["checkpoint"]
    if source is None or "vocab_size" in raw["model"]:
        return raw
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
