"""`torchrun -m launch.bench_ranks FOLDER`: one rank of `launch.bench suite=parallel`.

The folder is `launch.bench_parallel`'s: it holds the pickled job and takes the pickled rows.
"""

from __future__ import annotations

import logging
import pickle
import sys
from pathlib import Path

import torch.distributed as dist

from launch.bench_layouts import RankJob, measure
from launch.bench_parallel import JOB, ROWS
from launch.compose import configure_logging, leave


def main() -> None:
    """Measure the job's layouts."""
    configure_logging()
    logging.getLogger("training").setLevel(logging.WARNING)
    folder = Path(sys.argv[1])
    job: RankJob = pickle.loads((folder / JOB).read_bytes())
    rows = list(measure(job))
    if dist.get_rank() == 0:
        (folder / ROWS).write_bytes(pickle.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()
    leave(0)


if __name__ == "__main__":
    main()
