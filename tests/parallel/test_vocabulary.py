"""A vocabulary cut over real ranks gives the losses and gradients of a whole one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from models.distillation import chunked_kl
from models.loss import chunked_cross_entropy, chunked_token_losses, logits_of
from parallel.vocabulary import GroupVocabulary, padded_vocab_size, rows_of_rank
from tests.support.closeness import assert_close
from tests.support.distributed import run_ranks


@pytest.mark.parametrize(
    ("vocab_size", "tp", "multiple", "expected"),
    [
        (33, 2, 8, 40),
        (40, 4, 8, 40),
        (33, 3, 8, 48),
        (152_064, 8, 128, 152_064),
        (50_257, 6, 128, 50_304),
        (5, 4, 1, 8),
    ],
)
def test_the_padded_size_is_the_smallest_that_tp_and_the_multiple_divide(
    vocab_size: int, tp: int, multiple: int, expected: int
) -> None:
    assert padded_vocab_size(vocab_size, tp, multiple) == expected
    candidates = (size for size in range(vocab_size, expected + 1))
    assert next(s for s in candidates if s % tp == 0 and s % multiple == 0) == expected


@pytest.mark.parametrize(
    ("vocab_size", "tp", "multiple", "rows"),
    [(33, 2, 8, [20, 13]), (33, 4, 8, [10, 10, 10, 3]), (9, 4, 16, [4, 4, 1, 0])],
)
def test_ranks_hold_each_token_once_and_the_last_what_is_left(
    vocab_size: int, tp: int, multiple: int, rows: list[int]
) -> None:
    held = [rows_of_rank(vocab_size, tp, multiple, rank=rank) for rank in range(tp)]
    assert [len(each) for each in held] == rows
    assert [token for each in held for token in each] == list(range(vocab_size))


def shard_of(
    weight: Tensor, multiple: int, group: dist.ProcessGroup
) -> tuple[Tensor, GroupVocabulary]:
    """This rank's leaf of a whole `[V, D]` weight, padding rows NaN, and its vocabulary."""
    vocab_size, tp = weight.shape[0], group.size()
    rows = rows_of_rank(vocab_size, tp, multiple, rank=group.rank())
    size = padded_vocab_size(vocab_size, tp, multiple) // tp
    shard = weight.new_full((size, weight.shape[1]), float("nan"))
    shard[: len(rows)] = weight.detach()[rows.start : rows.stop]
    return shard.requires_grad_(), GroupVocabulary(rows.start, len(rows), group)


def added(values: Tensor) -> Tensor:
    """Sum over the ranks, as the region that brought `hidden` in would."""
    values = values.clone()
    dist.all_reduce(values)
    return values


def inputs(vocab_size: int, labels: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(vocab_size)
    hidden = torch.randn(13, 6).to(dtype).requires_grad_()
    weight = torch.randn(vocab_size, 6).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab_size, (13,))
    targets[1::4] = -100
    targets[4:8] = -100  # one whole chunk of 4
    if labels == "all masked":
        targets[:] = -100
    return hidden, weight, targets


def check_gradients(
    loss: Tensor,
    expected: Tensor,
    inputs: tuple[Tensor, Tensor],
    whole: tuple[Tensor, Tensor],
    vocabulary: GroupVocabulary,
) -> None:
    """The loss is the whole vocabulary's, to the same bit on all ranks; so are the gradients."""
    assert_close(loss, expected, relative=1e-14, name="loss")
    everywhere = [torch.empty_like(loss) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, loss.detach())
    assert all(torch.equal(each, loss) for each in everywhere)
    d_hidden, d_shard = torch.autograd.grad(loss * 0.37, inputs)
    wanted = torch.autograd.grad(expected * 0.37, whole)
    assert_close(added(d_hidden), wanted[0], relative=1e-13, name="d_hidden")
    held = wanted[1][vocabulary.first_row :][: vocabulary.num_rows]
    absolute = 1e-13 * float(wanted[1].abs().max())  # of all ranks: one may have no row
    assert_close(d_shard[: vocabulary.num_rows], held, absolute=absolute, name="d_weight")
    assert (d_shard[vocabulary.num_rows :] == 0).all()


def check_cross_entropy(
    vocab_size: int, multiple: int, chunk: int, z_loss: float, labels: str
) -> None:
    hidden, weight, targets = inputs(vocab_size, labels, torch.float64)
    assert dist.group.WORLD is not None
    shard, vocabulary = shard_of(weight, multiple, dist.group.WORLD)
    before = [(each.detach().clone(), each._version) for each in (hidden, shard, targets)]

    loss = chunked_cross_entropy(
        hidden, shard, targets, chunk_tokens=chunk, vocabulary=vocabulary, z_loss=z_loss
    )
    logits = hidden @ weight.T
    losses = F.cross_entropy(logits, targets, reduction="none")
    squares = logits.logsumexp(1).square()[targets != -100].sum()
    expected = losses.sum() + z_loss * squares
    check_gradients(loss, expected, (hidden, shard), (hidden, weight), vocabulary)
    assert_close(
        chunked_token_losses(hidden, shard, targets, chunk_tokens=chunk, vocabulary=vocabulary),
        losses, relative=1e-14, name="token losses",
    )  # fmt: skip
    for now, (then, version) in zip((hidden, shard, targets), before, strict=True):
        assert torch.equal(now.nan_to_num(7.0), then.nan_to_num(7.0))
        assert now._version == version


def check_divergence(vocab_size: int, multiple: int, chunk: int, temperature: float) -> None:
    hidden, weight, targets = inputs(vocab_size, "some", torch.float64)
    teacher_hidden = torch.randn(13, 9, dtype=torch.float64)
    teacher_weight = torch.randn(vocab_size, 9, dtype=torch.float64)
    assert dist.group.WORLD is not None
    shard, vocabulary = shard_of(weight, multiple, dist.group.WORLD)
    teacher_shard, _ = shard_of(teacher_weight, multiple, dist.group.WORLD)
    loss = chunked_kl(
        hidden, shard, teacher_hidden, teacher_shard.detach(), targets,
        chunk_tokens=chunk, temperature=temperature, vocabulary=vocabulary,
    )  # fmt: skip
    counted = targets != -100
    student = F.log_softmax(hidden @ weight.T / temperature, dim=1)[counted]
    teacher = F.log_softmax(teacher_hidden @ teacher_weight.T / temperature, dim=1)[counted]
    expected = F.kl_div(student, teacher, log_target=True, reduction="sum") * temperature**2
    check_gradients(loss, expected, (hidden, shard), (hidden, weight), vocabulary)


def check_lower_precision(dtype: torch.dtype, tolerance: float) -> None:
    hidden, weight, targets = inputs(33, "some", dtype)
    assert dist.group.WORLD is not None
    shard, vocabulary = shard_of(weight, 8, dist.group.WORLD)
    loss = chunked_cross_entropy(
        hidden, shard, targets, chunk_tokens=4, vocabulary=vocabulary, z_loss=0.1
    )
    assert loss.dtype == torch.float32
    loss.backward()
    exact = [each.detach().double().requires_grad_() for each in (hidden, weight)]
    logits = exact[0] @ exact[1].T
    squares = logits.logsumexp(1).square()[targets != -100].sum()
    expected = F.cross_entropy(logits, targets, reduction="sum") + 0.1 * squares
    expected.backward()
    assert_close(loss, expected, relative=tolerance, name="loss")
    assert hidden.grad is not None
    assert shard.grad is not None
    assert exact[0].grad is not None
    assert exact[1].grad is not None
    assert (hidden.grad.dtype, shard.grad.dtype) == (dtype, dtype)
    assert_close(added(hidden.grad), exact[0].grad, relative=3 * tolerance, name="d_hidden")
    held = exact[1].grad[vocabulary.first_row :][: vocabulary.num_rows]
    absolute = 3 * tolerance * float(exact[1].grad.abs().max())
    assert_close(shard.grad[: vocabulary.num_rows], held, absolute=absolute, name="d_weight")


def check_reductions(rank: int, world_size: int) -> None:
    assert dist.group.WORLD is not None
    vocabulary = GroupVocabulary(0, 1, dist.group.WORLD)
    values = torch.tensor([[1.0, -1.0], [0.5, float("-inf")]]).t() * (rank + 1)
    before = values.clone()
    total = sum(range(1, world_size + 1))
    assert torch.equal(vocabulary.sum(values), before / (rank + 1) * total)
    expected = torch.tensor([[1.0 * world_size, -1.0], [0.5 * world_size, float("-inf")]]).t()
    largest = vocabulary.max(values)
    assert torch.equal(largest, expected)
    assert type(largest) is Tensor
    assert torch.equal(values, before)
    alone = [dist.new_group([each]) for each in range(world_size)][rank]
    vocabulary = GroupVocabulary(0, 1, alone)
    assert torch.equal(vocabulary.sum(values), before)
    assert torch.equal(vocabulary.max(values), before)
    trained = torch.ones(2, requires_grad=True)
    for group in (dist.group.WORLD, alone):
        assert not GroupVocabulary(0, 1, group).sum(trained * 2).requires_grad


def check_logits(vocab_size: int, multiple: int) -> None:
    hidden, weight, _ = inputs(vocab_size, "some", torch.float64)
    assert dist.group.WORLD is not None
    shard, vocabulary = shard_of(weight, multiple, dist.group.WORLD)
    columns = logits_of(hidden.detach(), shard.detach(), vocabulary)
    parts = [torch.empty_like(columns) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, columns)
    logits = torch.cat(parts, dim=1)
    assert_close(logits[:, :vocab_size], hidden @ weight.T, relative=1e-14)
    assert (logits[:, vocab_size:] == float("-inf")).all()


def check_everything(rank: int, world_size: int) -> None:
    check_reductions(rank, world_size)
    for vocab_size, multiple in ((33, 8), (9, 16), (5, 16)):
        check_logits(vocab_size, multiple)
        for chunk in (1, 4, 13, 64):
            check_cross_entropy(vocab_size, multiple, chunk, 0.3 * (chunk > 1), "some")
            check_divergence(vocab_size, multiple, chunk, 1.0 if chunk == 1 else 2.5)
        check_cross_entropy(vocab_size, multiple, 4, 0.3, "all masked")
    check_lower_precision(torch.float32, 1e-6)
    check_lower_precision(torch.bfloat16, 4e-3)


@pytest.mark.parametrize("world_size", [2, 4])
def test_losses_of_a_cut_vocabulary_are_those_of_a_whole_one(
    world_size: int, tmp_path: Path
) -> None:
    run_ranks(check_everything, world_size, tmp_path=tmp_path)
