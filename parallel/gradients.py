"""What is checked and changed between backward and the optimizer: presence, finiteness, length.

torch's own clipping cannot mix meshes, counts replicated parameters more than once and reports a
NaN after the update; this one looks at local shards, exchanges three numbers a rank and speaks
before anything changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

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


def global_norm(gradients: Mapping[str, Tensor | None], mesh: Mesh) -> float:
    """Length of the whole gradient over all parameters and ranks, in float64.

    Args:
        gradients: this rank's shard of each trainable parameter's gradient, in the same order on
            every rank. An empty shard counts nothing.
        mesh: replicated shards are counted once.

    Raises:
        ValueError: a parameter without a gradient, on every rank, naming it and the rank.
        NonFiniteError: on every rank alike.
    """
    names = list(gradients)
    missing = next((i for i, gradient in enumerate(gradients.values()) if gradient is None), -1)
    norms = _norms([gradient for gradient in gradients.values() if gradient is not None])
    wrong = next((i for i, norm in enumerate(norms) if not math.isfinite(norm)), -1)
    square = math.fsum(norm * norm for norm in norms if math.isfinite(norm))
    rows = mesh.gather_numbers((square, wrong, missing))
    for rank, (_, _, index) in enumerate(rows):
        if index >= 0:
            raise ValueError(
                f"{names[int(index)]} must have a gradient after backward: got none on rank "
                f"{rank}. Freeze it (optimizer.freeze) or use it in the model."
            )
    for rank, (_, index, _) in enumerate(rows):
        if index >= 0:
            raise NonFiniteError("gradient norm", math.nan, rank=rank, parameter=names[int(index)])
    return math.sqrt(sum(row[0] for row in rows[: mesh.shard_size]))


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
