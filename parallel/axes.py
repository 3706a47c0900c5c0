"""Names and sizes of the mesh axes, from a config and a number of processes. Arithmetic only."""

from __future__ import annotations

from parallel.config import ParallelConfig, Shard

AXES = ("pp", "dp_replicate", "dp_shard", "tp")
"""Mesh axes from the outermost to the innermost: ranks next to each other share a tp group."""


def axis_sizes(config: ParallelConfig, num_processes: int) -> tuple[int, int, int, int]:
    """Sizes of `AXES` for so many processes.

    Raises:
        ValueError: axes whose product is another number, naming what to change.
    """
    model_ranks = config.pp * config.tp
    dp, rest = divmod(num_processes, model_ranks)
    if rest or dp == 0:
        raise ValueError(
            f"parallel.pp x parallel.tp ({config.pp} x {config.tp}) must divide the number of "
            f"processes: got {num_processes}. Start a multiple of {model_ranks} (torchrun "
            f"--nproc-per-node {model_ranks}), or change parallel.pp or parallel.tp."
        )
    _check_dp(config, dp, num_processes)
    if config.shard is Shard.none:
        return config.pp, dp, 1, config.tp
    if dp % config.dp_replicate:
        divisors = [size for size in range(1, dp + 1) if dp % size == 0]
        below = [size for size in divisors if size < config.dp_replicate][-1:]
        above = [size for size in divisors if size > config.dp_replicate][:1]
        raise ValueError(
            f"parallel.dp_replicate ({config.dp_replicate}) must divide parallel.dp: got {dp}. Set "
            f"it to {' or '.join(str(size) for size in below + above)}, or change the number of "
            "processes."
        )
    return config.pp, config.dp_replicate, dp // config.dp_replicate, config.tp


def _check_dp(config: ParallelConfig, dp: int, num_processes: int) -> None:
    """Refuse a number of dp ranks that is not what the other axes leave of the processes."""
    if config.dp_shard is None:
        wanted, given = config.dp, f"parallel.dp ({config.dp})"
        fix = f"set parallel.dp={dp} or null"
    else:
        wanted = config.dp_replicate * config.dp_shard
        factors = f"{config.dp_replicate} x {config.dp_shard}"
        given = f"parallel.dp_replicate x parallel.dp_shard ({factors})"
        fix = "leave parallel.dp and parallel.dp_shard null"
    if wanted is None or wanted == dp:
        return
    model_ranks = config.pp * config.tp
    share = f" / (pp {config.pp} x tp {config.tp})" if model_ranks > 1 else ""
    needed = wanted * model_ranks
    raise ValueError(
        f"{given} must equal the number of processes: got {num_processes}{share}. Start {needed} "
        f"(torchrun --nproc-per-node {needed}), or {fix}."
    )
