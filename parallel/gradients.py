"""What is checked and changed between backward and the optimizer: presence, finiteness, length.

torch's own clipping cannot mix meshes, counts replicated parameters more than once and reports a
NaN after the update; this one looks at local shards, exchanges three numbers a rank and speaks
before anything changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.mesh import Mesh


class NonFiniteError(RuntimeError):
    """A loss or gradient that is infinite or not a number; nothing has been updated.

    `quantity` is "loss" or "gradient norm", `rank` the first rank that saw it, `parameter` the
    first parameter (None for a loss).
    """

    def __init__(self, quantity: str, value: float, *, rank: int, parameter: str | None) -> None:
        place = "" if parameter is None else f", first in the gradient of {parameter}"
        super().__init__(
            f"{quantity} ({value}) must be finite: rank {rank} was the first to see it{place}. "
            "Parameters and optimizer state are unchanged. Look at this step's samples, lower the "
            "learning rate or lengthen warmup_steps."
        )
        self.quantity, self.value = quantity, value
        self.rank, self.parameter = rank, parameter


@dataclass(frozen=True, slots=True)
class Shares:
    """What one rank contributes to the global norm.

    `table` names all parameters of the model, so that ranks can speak of one by its number.
    `counted` are those whose part here no other rank counts too.
    """

    table: tuple[str, ...]
    counted: frozenset[str]


def global_norm(gradients: Mapping[str, Tensor | None], shares: Shares, mesh: Mesh) -> float:
    """Length of the whole gradient over all parameters and ranks, in float64.

    Args:
        gradients: this rank's part of each gradient that it has a parameter of, complete. An empty
            one counts nothing.
        shares: replicated and tied parts are counted once.
        mesh: all ranks.

    Raises:
        ValueError: a parameter without a gradient, on every rank, naming it and the rank.
        NonFiniteError: on every rank alike.
    """
    present = {name: value for name, value in gradients.items() if value is not None}
    norms = dict(zip(present, _norms(list(present.values())), strict=True))
    wrong = next((name for name, norm in norms.items() if not math.isfinite(norm)), None)
    square = math.fsum(
        norm * norm
        for name, norm in norms.items()
        if name in shares.counted and math.isfinite(norm)
    )
    rows = mesh.gather_numbers((square, number(wrong, shares), number(missing(gradients), shares)))
    refuse_missing([row[2] for row in rows], shares)
    for rank, (_, index, _) in enumerate(rows):
        if index >= 0:
            name = shares.table[int(index)]
            raise NonFiniteError("gradient norm", math.nan, rank=rank, parameter=name)
    return math.sqrt(sum(row[0] for row in rows))


def missing(gradients: Mapping[str, Tensor | None]) -> str | None:
    """The first parameter without a gradient."""
    return next((name for name, gradient in gradients.items() if gradient is None), None)


def number(name: str | None, shares: Shares) -> float:
    """A parameter's number in the table, -1 for none, as something that ranks can exchange."""
    return -1.0 if name is None else float(shares.table.index(name))


def refuse_missing(numbers: Sequence[float], shares: Shares) -> None:
    """Refuse a gradient that is missing on some rank; `numbers` has one entry a rank.

    Raises:
        ValueError: naming the parameter and the rank.
    """
    for rank, index in enumerate(numbers):
        if index >= 0:
            raise ValueError(
                f"{shares.table[int(index)]} must have a gradient after backward: got none on rank "
                f"{rank}. Freeze it (optimizer.freeze) or use it in the model."
            )


def clip(gradients: list[Tensor], norm: float, max_norm: float | None) -> None:
    """Scale shards in place so that the global norm is at most `max_norm` (None: leave them)."""
    if max_norm is not None and norm > max_norm and gradients:
        torch._foreach_mul_(gradients, max_norm / norm)


def _norms(gradients: list[Tensor]) -> list[float]:
    """2-norms accumulated in float64, with one copy to the host."""
    if not gradients:
        return []
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
    values: list[float] = torch.stack(norms).tolist()
    return values
