"""`python -m launch.train`: continual pretraining of one experiment, on one process or many."""

from __future__ import annotations

from launch.compose import command, leave
from launch.model_source import model_from_checkpoint
from training.config import RunConfig


@command("train", RunConfig, resolve=model_from_checkpoint)
def main(config: RunConfig) -> None:
    """Continual pretraining through the stages of an experiment.

    The same command again resumes from the newest complete checkpoint of run_dir. Many processes:
    torchrun --nproc-per-node N -m launch.train key=value ... Asked to stop (SIGTERM, SIGUSR1) a run
    saves, says so in run_dir/stopped.json and ends with status 0.
    """
    # Imported late: a wrong command line and --help need no engine, which takes longer than both.
    from training.run import run

    if not run(config):
        leave(0)
        # A sweep would go on to its next job.
        raise SystemExit(0)


if __name__ == "__main__":
    main()
