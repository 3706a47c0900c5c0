"""Seeded operands, documents and comparisons that the kernel tests share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models import reference
from models.kernels import SinkKeys
from models.sequence import SequenceContext
from tests.support.closeness import assert_close, relative_error


def documents(rows: list[list[int]]) -> SequenceContext:
    """Rows given by the lengths of their documents."""
    return SequenceContext.from_document_ids(
        torch.stack(
            [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows]
        )
    )


def linear_operands(
    rows: int,
    tokens: int,
    *,
    heads: int = 4,
    groups: int = 2,
    dim: int = 8,
    dtype: torch.dtype = torch.float64,
    strong: bool = False,
) -> list[Tensor]:
    """q, k, v, log_decay and a state. `strong`: keys tied to their gates, logits of spread 20."""
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, v = normal(rows, tokens, heads, dim).relu(), normal(rows, tokens, groups, dim)
    if strong:
        logits = 20 * normal(rows, tokens, groups, dim)
        k, log_decay = logits.sigmoid(), F.logsigmoid(-logits)
    else:
        k = normal(rows, tokens, groups, dim).relu()
        log_decay = F.logsigmoid(normal(rows, tokens, groups, dim)) / 4
    state = normal(rows, groups, dim, dim)
    wide = torch.promote_types(dtype, torch.float32)
    return [q.to(dtype), k.to(dtype), v.to(dtype), log_decay.to(wide), state.to(wide)]


def softmax_operands(
    rows: int,
    queries: int,
    keys: int,
    *,
    heads: int = 4,
    groups: int = 2,
    dim: int = 8,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """q, k, v."""
    generator = torch.Generator().manual_seed(queries * 1000 + keys)
    shapes = [(rows, queries, heads, dim), (rows, keys, groups, dim), (rows, keys, groups, dim)]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    ]


def sink_operands(operands: list[Tensor], count: int, *, own_queries: bool) -> list[Tensor]:
    """Keys and values of `count` sinks beside q, k, v; on request queries of their own."""
    q, k, _ = operands
    generator = torch.Generator().manual_seed(count)
    shapes = [(count, *k.shape[2:])] * 2 + [tuple(q.shape)] * own_queries
    return [torch.randn(x, generator=generator, dtype=torch.float64).to(q.dtype) for x in shapes]


def document_state(operands: list[Tensor]) -> Tensor:
    """A state `[G, H, H]` for documents to start from, beside what `linear_operands` gives."""
    generator = torch.Generator().manual_seed(3)
    like = operands[4][0]
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)


def linear_results(
    kernel: Callable[..., Any],
    operands: list[Tensor],
    sequence: SequenceContext | None,
    *,
    with_state: bool = True,
) -> dict[str, Tensor]:
    """Output, final state and all gradients of a kernel; both results carry a random gradient.

    A sixth operand is the state that documents start from.
    """
    names = ("q", "k", "v", "log_decay", "initial_state", "document_state")
    leaves = {
        name: x.detach().clone().requires_grad_()
        for name, x in zip(names, operands, strict=False)
        if with_state or name != "initial_state"
    }
    out, final = kernel(**leaves, scale=0.3, sequence=sequence, output_final_state=True)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (out, final)]
    loss = sum(
        (x.double() * weight.to(x.device)).sum()
        for x, weight in zip((out, final), weights, strict=True)
    )
    grads = torch.autograd.grad(loss, list(leaves.values()))
    named = {f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {"out": out, "final_state": final} | named


def softmax_results(
    kernel: Callable[..., Tensor],
    operands: list[Tensor],
    *,
    window: int | None,
    sequence: SequenceContext | None,
) -> dict[str, Tensor]:
    """Output and all gradients of a kernel; operands after q, k, v are those of sinks."""
    leaves = [x.detach().clone().requires_grad_() for x in operands]
    sinks = SinkKeys(*leaves[3:]) if len(leaves) > 3 else None
    out = kernel(*leaves[:3], scale=0.3, window=window, sequence=sequence, sinks=sinks)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device)
    grads = torch.autograd.grad((out.double() * weight).sum(), leaves)
    names = ("q", "k", "v", "sink k", "sink v", "sink q")
    named = {f"grad {name}": grad for name, grad in zip(names, grads, strict=False)}
    return {"out": out} | named


def worst(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of each result; the dtypes are not compared."""
    assert actual.keys() == expected.keys()
    return {name: relative_error(actual[name], expected[name]) for name in expected}


def assert_results(
    actual: dict[str, Tensor], expected: dict[str, Tensor], *, relative: float
) -> None:
    """Every result within `relative` of the largest expected value (1e-14 where that is zero)."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(actual[name], value, relative=relative, absolute=1e-14, name=name)


def double(operands: list[Tensor]) -> list[Tensor]:
    """The same values in float64, for the oracle."""
    return [x.double() for x in operands]


def recurrence(
    operands: list[Tensor], sequence: SequenceContext | None, *, with_state: bool = True
) -> dict[str, Tensor]:
    """What the slow definition gives in float64."""
    return linear_results(
        reference.linear_attention, double(operands), sequence, with_state=with_state
    )


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Uninitialised memory is NaN, so that reading it shows."""
    new_empty, empty_like, empty = torch.Tensor.new_empty, torch.empty_like, torch.empty

    def poison(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocated(*args: Any, **kwargs: Any) -> Tensor:
            result = allocate(*args, **kwargs)
            return result.fill_(math.nan) if result.is_floating_point() else result

        return allocated

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", poison(new_empty))
        patch.setattr(torch, "empty_like", poison(empty_like))
        patch.setattr(torch, "empty", poison(empty))
        yield
