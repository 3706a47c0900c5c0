"""A layout as text: its axes, and a table of what each pipeline coordinate's ranks do and hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from models.cost import parameter_count
from parallel.mesh import Mesh
from parallel.pipeline_cut import StageCut
from parallel.rank_memory import RankMemory
from training.config import RunConfig
from training.layout import cut_stages
from training.planned_job import left_out, planned_memory, unplanned

MEMORY_COLUMNS = (
    "weights", "gradients", "optimizer", "activations", "logits", "neurons", "buffers", "peak",
)  # fmt: skip
UNITS = {"GiB": 2**30, "MiB": 2**20}
Row = tuple[str, ...]


def layout_lines(config: RunConfig, mesh: Mesh, *, kernels: tuple[str, str]) -> Iterator[str]:
    """The model, the mesh axes, and the table of ranks."""
    parallel, stages = config.parallel, cut_stages(config)
    copies = mesh.dp_size // mesh.shard_size
    count = "1 rank" if mesh.size == 1 else f"{mesh.size} ranks"
    split = " (sequence parallel)" if parallel.sequence_parallel else ""
    yield (
        f"{config.model.layers.describe()} | {parameter_count(config.model):,} parameters | "
        f"{config.training.precision.value}"
    )
    yield (
        f"{count} = pp {mesh.pp_size} x dp {mesh.dp_size} x tp {mesh.tp_size}{split}, "
        f"dp = {copies} x {mesh.shard_size} shards ({parallel.shard.value})"
    )
    if mesh.ep_size > 1:
        each = config.model.moe.num_experts // mesh.ep_size
        yield f"experts over ep {mesh.ep_size} of dp, {each} a rank"
    if mesh.pp_size > 1:
        yield f"schedule {parallel.schedule.value}, {len(stages)} stages"
    if (reason := unplanned(config.model)) is not None:
        yield f"no planned memory: {reason}"
        return
    memory = planned_memory(config, num_ranks=mesh.size, kernels=kernels)
    yield from rank_table(stages, memory, ranks_each=mesh.size // mesh.pp_size)
    for line in left_out(config):
        yield f"  {line}"


def rank_table(
    stages: Sequence[StageCut], memory: Sequence[RankMemory], *, ranks_each: int
) -> Iterator[str]:
    """A line a pp coordinate: its ranks, layers, share of the work, and planned memory of a rank.

    `peak` is the most at once, gathered parameters and whole gradients included.
    """
    unit = "GiB" if max(each.peak for each in memory) >= UNITS["GiB"] else "MiB"
    yield f"planned memory of a rank in {unit}; peak is the most at once, no sum"
    rows: list[Row] = [
        ("pp rank", "ranks", "layers", "work", "in flight", "parameters", *MEMORY_COLUMNS)
    ]
    total = sum(stage.cost for stage in stages)
    for each in memory:
        own = [stage for stage in stages if stage.pp_rank == each.pp_rank]
        first = each.pp_rank * ranks_each
        rows.append((
            str(each.pp_rank), _span(first, first + ranks_each), _layers(own),
            f"{sum(stage.cost for stage in own) / total:.0%}",
            " ".join(str(count) for count in each.in_flight.values()), f"{each.parameters:,}",
            *(f"{getattr(each, column) / UNITS[unit]:.2f}" for column in MEMORY_COLUMNS),
        ))  # fmt: skip
    yield from aligned(rows)


def aligned(rows: Sequence[Row]) -> Iterator[str]:
    """Columns of one width: the first to the left, the others to the right; two spaces before."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        cells = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        yield "  ".join(("", first.ljust(widths[0]), *cells)).rstrip()


def _layers(stages: Sequence[StageCut]) -> str:
    layers = " ".join(_span(stage.first_layer, stage.end_layer) for stage in stages)
    embedding = " + embedding" * any(stage.has_embedding for stage in stages)
    return layers + embedding + " + head" * any(stage.has_head for stage in stages)


def _span(first: int, end: int) -> str:
    if end - first < 2:
        return "none" if first == end else str(first)
    return f"{first}-{end - 1}"
