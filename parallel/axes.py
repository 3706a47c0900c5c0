"""Names and sizes of the mesh axes, from a config and a number of processes. Arithmetic only."""

from __future__ import annotations

from collections.abc import Sequence

from parallel.config import ParallelConfig, Shard

AXES = ("pp", "dp_replicate", "dp_shard", "tp")
"""Mesh axes from the outermost to the innermost: ranks next to each other share a tp group."""
EXPERT_AXES = ("pp", "edp_replicate", "edp_shard", "ep", "tp")
"""The same ranks as experts lie over them: ep is the innermost part of all data-parallel ranks."""


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
    if dp % config.ep:
        raise ValueError(
            f"parallel.ep ({config.ep}) must divide parallel.dp, whose ranks share out the "
            f"experts: got {dp}. Set it to {_divisors_near(config.ep, dp)}, or change the number "
            "of processes."
        )
    if config.shard is Shard.none:
        return config.pp, dp, 1, config.tp
    if dp % config.dp_replicate:
        raise ValueError(
            f"parallel.dp_replicate ({config.dp_replicate}) must divide parallel.dp: got {dp}. Set "
            f"it to {_divisors_near(config.dp_replicate, dp)}, or change the number of processes."
        )
    return config.pp, config.dp_replicate, dp // config.dp_replicate, config.tp


def expert_axis_sizes(sizes: Sequence[int], ep: int) -> tuple[int, int, int, int, int]:
    """Sizes of `EXPERT_AXES` from those of `AXES`; ep must divide the data-parallel ranks.

    Where ep divides the shards of one copy of the model, a rank's experts are sharded over the rest
    of that copy. Otherwise ep reaches over copies, and the rest of dp holds copies of the experts.
    """
    pp, replicate, shard, tp = sizes
    assert replicate * shard % ep == 0, "axis_sizes has refused this"
    if shard % ep == 0:
        return pp, replicate, shard // ep, ep, tp
    return pp, replicate * shard // ep, 1, ep, tp


def _divisors_near(size: int, number: int) -> str:
    """The next smaller and larger divisor of a number, as a choice."""
    divisors = [each for each in range(1, number + 1) if number % each == 0]
    below = [each for each in divisors if each < size][-1:]
    above = [each for each in divisors if each > size][:1]
    return " or ".join(str(each) for each in below + above)


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
