"""Each border of a tensor-parallel region against the arithmetic of one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.regions import TensorRegion
from tests.support.distributed import run_ranks

RANKS = 2
ROWS, TOKENS, WIDTH = 3, 4, 5
"""Of the residual stream of one rank, cut along its tokens or whole."""


def whole_numbers(seed: int, *shape: int) -> Tensor:
    """Small ones, so that sums are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-9, 10, shape, generator=generator).double()


def inputs_of(border: str) -> list[Tensor]:
    """What each rank gives the border: all tokens, or its own where it has only those."""
    held = TOKENS // RANKS if border == "enter tokens" else TOKENS
    return [whole_numbers(rank, ROWS, held, WIDTH) for rank in range(RANKS)]


def gradients_of(border: str) -> list[Tensor]:
    """What each rank's backward starts from: as large as the border's output."""
    held = TOKENS // RANKS if border == "leave tokens" else TOKENS
    return [whole_numbers(10 + rank, ROWS, held, WIDTH) for rank in range(RANKS)]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.clone(),
    "transposed": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
    "strided": lambda x: torch.stack([x, x + 100], dim=-1)[..., 0],
    "expanded": lambda x: x[:1, :1, :1].expand(x.shape),
}
"""How the values lie in memory; megatron-core's all-reduce ignores ranks for the last three."""

Expected = Callable[[Sequence[Tensor]], list[Tensor]]


def cut(x: Tensor) -> list[Tensor]:
    return list(x.chunk(RANKS, dim=1))


def as_it_is(values: Sequence[Tensor]) -> list[Tensor]:
    return list(values)


def summed(values: Sequence[Tensor]) -> list[Tensor]:
    return [torch.stack(list(values)).sum(dim=0)] * RANKS


def joined(values: Sequence[Tensor]) -> list[Tensor]:
    return [torch.cat(list(values), dim=1)] * RANKS


def summed_and_cut(values: Sequence[Tensor]) -> list[Tensor]:
    return cut(torch.stack(list(values)).sum(dim=0))


BORDERS: dict[str, tuple[Expected, Expected]] = {
    "enter": (as_it_is, summed),
    "leave": (summed, as_it_is),
    "channel sum": (summed, summed),
    "enter tokens": (joined, summed_and_cut),
    "leave tokens": (summed_and_cut, joined),
}
"""What each rank gets forward from all inputs, and backward from all gradients."""


def border_of(name: str) -> Callable[[Tensor], Tensor]:
    region = TensorRegion(dist.group.WORLD, sequence_parallel="tokens" in name)
    if name == "channel sum":
        return region.channel_sum
    return region.enter if name.startswith("enter") else region.leave


def cross_all_borders(rank: int, world_size: int) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    results = {}
    for name in BORDERS:
        for layout, lay in LAYOUTS.items():
            x = lay(inputs_of(name)[rank]).detach().requires_grad_()
            gradient = lay(gradients_of(name)[rank])
            before = x.detach().clone(), gradient.clone()
            out = border_of(name)(x)
            (found,) = torch.autograd.grad(out, x, gradient)
            assert torch.equal(x, before[0]), "the input must stay as it was"
            assert torch.equal(gradient, before[1]), "the gradient must stay as it was"
            results[name, layout] = out.detach().clone(), found.clone()
    return results


@pytest.fixture(scope="module")
def crossed(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder: Path = tmp_path_factory.mktemp("borders")
    return run_ranks(cross_all_borders, RANKS, tmp_path=folder)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", BORDERS)
def test_a_border_computes_what_its_table_says(crossed: list[Any], name: str, layout: str) -> None:
    lay, (forward, backward) = LAYOUTS[layout], BORDERS[name]
    outputs = forward([lay(x) for x in inputs_of(name)])
    gradients = backward([lay(g) for g in gradients_of(name)])
    for rank, result in enumerate(crossed):
        out, gradient = result[name, layout]
        assert torch.equal(out, outputs[rank]), f"forward on rank {rank}"
        assert torch.equal(gradient, gradients[rank]), f"backward on rank {rank}"
