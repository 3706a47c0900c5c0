"""The few numbers that ranks tell each other in a step: counts, flags, statistics. No gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.engine_protocol import Microbatch
from parallel.mesh import Mesh


def agree_on_size(
    mesh: Mesh, microbatches: Sequence[Microbatch], num_targets: int
) -> tuple[int, int]:
    """Rows and tokens of all ranks' microbatches.

    Refuses a step that ranks see differently: they would hang, or train on another loss.

    Raises:
        ValueError: on every rank alike, with each rank's number; or a step without anything in it.
    """
    num_microbatches = len(microbatches)
    num_rows = sum(each.tokens.shape[0] for each in microbatches)
    num_tokens = sum(each.tokens.numel() for each in microbatches)
    rows = mesh.gather_numbers((num_microbatches, num_targets, num_rows, num_tokens))
    names = ("microbatches", "num_targets")
    # Ranks that send each other rows of experts count on as many.
    for index, name in enumerate((*names, "rows") if mesh.ep_size > 1 else names):
        values = [row[index] for row in rows]
        if len(set(values)) > 1:
            raise ValueError(
                f"{name} ({[int(value) for value in values]}, one entry a rank) must be the "
                "same on every rank. Give each rank as many rows, and num_targets summed over "
                "ranks."
            )
    if num_microbatches < 1 or num_targets < 1:
        raise ValueError(
            f"microbatches ({num_microbatches}) and num_targets ({num_targets}) must be at "
            "least 1: this step has nothing to learn from."
        )
    own = [rows[rank] for rank in mesh.ranks_at(pp=0, tp=0)]
    return sum(int(row[2]) for row in own), sum(int(row[3]) for row in own)


def agree(mesh: Mesh, values: Tensor, flags: Sequence[bool]) -> tuple[Tensor, tuple[bool, ...]]:
    """Sum of `values` over data-parallel ranks, and which flags any rank at all raised.

    Summed in rank order in float64: the same bits on every rank.
    """
    row = [*values.reshape(-1).double().tolist(), *(float(flag) for flag in flags)]
    rows = torch.tensor(mesh.gather_numbers(row), dtype=torch.float64)
    total = rows[mesh.ranks_at(pp=0, tp=0)].sum(dim=0)
    count = values.numel()
    raised = tuple(bool(column.any()) for column in rows[:, count:].unbind(dim=1))
    return total[:count].reshape(values.shape), raised


def sum_by_name(mesh: Mesh, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sum float64 tensors of one shape over all ranks, where a rank may lack some names.

    Exact, so equal on every rank and for every layout, for whole numbers below 2^53.
    """
    own = {name: tuple(value.shape) for name, value in values.items()}
    shapes = {name: shape for found in mesh.gather(own) for name, shape in found.items()}
    names = sorted(shapes)
    if not names:
        return {}
    table = torch.stack(
        [values.get(name, torch.zeros(shapes[name])).cpu().double() for name in names]
    )
    if mesh.size > 1:
        table = table.to(mesh.device)
        dist.all_reduce(table, group=mesh.group)
    return dict(zip(names, table.cpu(), strict=True))
