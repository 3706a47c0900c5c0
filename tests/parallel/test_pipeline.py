"""What a pipeline does besides its numbers: one forward a microbatch, other shapes, evaluation."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.layouts import parameter_layouts
from models.sequence import SequenceContext
from parallel.backend.cpu import CpuBackend
from parallel.config import PipelineSchedule
from parallel.engine import ParamGroup, TorchEngine
from parallel.mesh import init
from parallel.pipeline_cut import cut
from tests.parallel.engine_cases import (
    TOKENS,
    Case,
    Rows,
    Rule,
    build_engine,
    config_of,
    gather,
    rows_of,
    spikes_of,
    spiking_of,
    train_step,
)
from tests.parallel.engine_oracle import plain_model
from tests.parallel.test_layout_matrix import INTERLEAVED, ZERO_BUBBLE, case
from tests.support.closeness import assert_close
from tests.support.distributed import run_ranks

LOSS, GRADIENT = 1e-12, 1e-11
CASES: dict[str, Case] = {
    "gpipe": case(pp=2, schedule=PipelineSchedule.gpipe),
    "one_f_one_b": case(pp=2),
    "interleaved tied": case(**INTERLEAVED, tied=True),
    "zero_bubble": case(**ZERO_BUBBLE),
    "zero_bubble virtual": case(**ZERO_BUBBLE, virtual_stages=2),
    "an empty last stage": case(pp=2, stage_layers=[4, 0]),
    "an empty middle stage": case(**INTERLEAVED, stage_layers=[1, 0, 2, 1]),
}
NUM_MICROBATCHES = 4
SHAPES = [(4, 2, 20), (2, 4, 20), (4, 2, 12), (4, 2, 20)]
"""Microbatches, rows and tokens of steps that follow each other."""
EVALUATED = [(3, 20), (1, 20), (3, 7)]
"""Rows and tokens of evaluations in between: nothing that divides anything."""


def piece(shape: tuple[int, int], seed: int) -> Rows:
    """The first rows and tokens of a step's rows."""
    rows, tokens = shape
    whole = rows_of(seed)
    return Rows(
        whole.tokens[:rows, :tokens], whole.labels[:rows, :tokens],
        whole.document_ids[:rows, :tokens],
    )  # fmt: skip


def microbatches_of(shape: tuple[int, int, int]) -> list[Rows]:
    count, rows, tokens = shape
    whole = piece((count * rows, tokens), seed=2)
    parts = [tensor.split(rows) for tensor in (whole.tokens, whole.labels, whole.document_ids)]
    return [Rows(*part) for part in zip(*parts, strict=True)]


def num_targets(microbatches: list[Rows]) -> int:
    return sum(int((part.labels != -100).sum()) for part in microbatches)


class Forwards:
    """Counts the forward passes of every block and looks at what each stage hands on."""

    def __init__(self, engine: TorchEngine) -> None:
        self.blocks: Counter[int] = Counter()
        self.outputs: list[tuple[bool, tuple[int, ...]]] = []
        for part in engine.parts:
            part.register_forward_hook(self._look)
            for block in part.blocks:
                block.register_forward_hook(self._count)

    def _count(self, block: nn.Module, *_: Any) -> None:
        self.blocks[block.layer] += 1

    def _look(self, part: nn.Module, _: Any, output: Tensor) -> None:
        self.outputs.append((part.part.has_head, tuple(output.shape)))


@dataclass(frozen=True)
class Seen:
    """What one rank saw of a case."""

    trained: dict[int, int]
    evaluated: dict[int, int]
    outputs: list[tuple[bool, tuple[int, ...]]]
    losses: list[float]
    evaluations: list[Tensor]
    schedules: list[bool]
    after: Tensor
    updated: dict[str, Tensor]


def look_at(each: Case) -> Seen:
    mesh = init(CpuBackend(), each.parallel)
    engine = build_engine(mesh, each)
    forwards = Forwards(engine)
    train_step(engine, each, 0)
    trained, outputs = dict(forwards.blocks), list(forwards.outputs)
    forwards.blocks.clear()
    evaluations = [engine.token_losses(piece(EVALUATED[0], 1), spikes=spikes_of(each))]
    evaluated = dict(forwards.blocks)
    losses, built = [], []
    for shape in SHAPES:
        microbatches = microbatches_of(shape)
        found = engine.forward_backward(
            microbatches, num_targets=num_targets(microbatches), spikes=spikes_of(each)
        )
        losses.append(found["loss"])
        built.append(engine._runner._built[1])
        for evaluation in EVALUATED[1:]:
            evaluations.append(engine.token_losses(piece(evaluation, 1), spikes=spikes_of(each)))
    again = engine.forward_backward(
        microbatches, num_targets=num_targets(microbatches), spikes=spikes_of(each)
    )
    built.append(engine._runner._built[1])
    assert again["loss"] == losses[-1]
    kept = [one is other for one, other in zip(built, built[1:], strict=False)]
    before = engine.token_losses(piece(EVALUATED[0], 1), spikes=spikes_of(each))
    assert torch.equal(before, evaluations[0]), "nothing has been updated yet"
    engine.clip_and_step(0.01)
    after = engine.token_losses(piece(EVALUATED[0], 1), spikes=spikes_of(each))
    updated = gather(mesh, engine.parameters)
    return Seen(trained, evaluated, outputs, losses, evaluations, kept, after, updated)


def look_at_all(rank: int, world_size: int) -> dict[str, Seen]:
    return {name: look_at(each) for name, each in CASES.items()}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Seen]]:
    folder: Path = tmp_path_factory.mktemp("pipelines")
    return run_ranks(look_at_all, 2, tmp_path=folder)


@pytest.mark.parametrize("name", CASES)
def test_each_block_runs_forward_once_a_microbatch(seen: list[Any], name: str) -> None:
    """Also in the first step, where torch would trace the shapes by a real pass of its own."""
    for counts, times in (("trained", NUM_MICROBATCHES), ("evaluated", 1)):
        found = [getattr(rank[name], counts) for rank in seen]
        assert not found[0].keys() & found[1].keys(), "every layer is on one rank"
        assert found[0] | found[1] == dict.fromkeys(range(4), times)


@pytest.mark.parametrize("name", CASES)
def test_no_logits_leave_the_last_stage(seen: list[Any], name: str) -> None:
    """Stages hand on the residual stream, the last one a number a microbatch."""
    stages = CASES[name].parallel.num_stages
    outputs = [output for rank in seen for output in rank[name].outputs]
    assert len(outputs) == NUM_MICROBATCHES * stages
    with_head = [shape for has_head, shape in outputs if has_head]
    assert with_head == [()] * NUM_MICROBATCHES
    assert {shape for has_head, shape in outputs if not has_head} == {(2, TOKENS, 24)}


@pytest.mark.parametrize("name", CASES)
def test_steps_may_change_their_shape(seen: list[Any], name: str) -> None:
    """The schedule is built again for another shape and kept for the same one."""
    model = plain_model(CASES[name])
    spikes = spikes_of(CASES[name])
    for index, shape in enumerate(SHAPES):
        rows = microbatches_of(shape)
        total = sum(
            model(part.tokens, context(part), labels=part.labels, spikes=spikes) for part in rows
        )
        expected = float(total.detach()) / num_targets(rows)
        for rank in seen:
            assert_close(rank[name].losses[index], expected, relative=LOSS, name=str(shape))
    for rank in seen:
        assert rank[name].schedules == [False, False, False, True]


def context(rows: Rows) -> SequenceContext:
    return SequenceContext.from_document_ids(rows.document_ids)


@pytest.mark.parametrize("name", CASES)
def test_evaluation_is_that_of_one_process(seen: list[Any], name: str) -> None:
    """Token by token, on every stage, between steps of any shape."""
    model = plain_model(CASES[name])
    shapes = [EVALUATED[0], *EVALUATED[1:] * len(SHAPES)]
    for rank in seen:
        assert len(rank[name].evaluations) == len(shapes)
        for shape, found in zip(shapes, rank[name].evaluations, strict=True):
            rows = piece(shape, 1)
            expected = model.token_losses(
                rows.tokens, context(rows), rows.labels, spikes=spikes_of(CASES[name])
            )
            assert_close(found, expected, relative=LOSS, name=str(shape))
            assert torch.equal(found == 0, rows.labels == -100)


@pytest.mark.parametrize("name", CASES)
def test_evaluation_sees_the_last_update(seen: list[Any], name: str) -> None:
    """Parameters that the evaluation before it gathered must be gone."""
    model, rows = plain_model(CASES[name]), piece(EVALUATED[0], 1)
    found: Seen = seen[0][name]
    for parameter, value in found.updated.items():
        model.get_parameter(parameter).data.copy_(value)
    expected = model.token_losses(
        rows.tokens, context(rows), rows.labels, spikes=spikes_of(CASES[name])
    )
    assert_close(found.after, expected, relative=LOSS)
    assert not torch.equal(found.after, found.evaluations[0])


FROZEN_STAGE = {
    "gpipe": case(pp=2, schedule=PipelineSchedule.gpipe),
    "one_f_one_b": case(pp=2),
    "interleaved": case(**INTERLEAVED),
    "zero_bubble": case(**ZERO_BUBBLE),
    "zero_bubble virtual": case(**ZERO_BUBBLE, virtual_stages=2),
}
TRAINED = {"first": "blocks.0.", "last": "blocks.3.", "head": "head."}
"""Beginnings of the names that are trained; whole stages have nothing to train."""


def trained_names(each: Case, beginning: str) -> tuple[str, ...]:
    return tuple(name for name in parameter_layouts(config_of(each)) if name.startswith(beginning))


def train_a_part(rank: int, world_size: int) -> dict[tuple[str, str], tuple[float, Any]]:
    """One step in which all but a few parameters are frozen."""
    results = {}
    for name, each in FROZEN_STAGE.items():
        for part, beginning in TRAINED.items():
            config, mesh = config_of(each), init(CpuBackend(), each.parallel)
            engine = TorchEngine(
                config,
                mesh=mesh,
                groups=[ParamGroup(trained_names(each, beginning), 0.0, 1.0)],
                rule=Rule(),
                spiking=spiking_of(each),
                precision=each.precision,
                parallel=each.parallel,
                stages=cut(config, each.parallel, sequence_length=TOKENS),
                seed=7,
            )
            loss = train_step(engine, each, 0)
            gradients = gather(mesh, engine.gradients())
            engine.clip_and_step(0.1)
            results[name, part] = loss, gradients
    return results


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[float, Any]]:
    folder: Path = tmp_path_factory.mktemp("frozen")
    result: dict[Any, Any] = run_ranks(train_a_part, 2, tmp_path=folder)[0]
    return result


@pytest.mark.parametrize("part", TRAINED)
@pytest.mark.parametrize("name", FROZEN_STAGE)
def test_stages_without_anything_to_train(frozen: Any, name: str, part: str) -> None:
    each = FROZEN_STAGE[name]
    model, rows = plain_model(each), rows_of(0)
    loss = model(rows.tokens, context(rows), labels=rows.labels, spikes=spikes_of(each))
    loss = loss / num_targets([rows])
    parameters = dict(model.named_parameters())
    names = trained_names(each, TRAINED[part])
    expected = torch.autograd.grad(loss, [parameters[name] for name in names])
    found_loss, found = frozen[name, part]
    assert_close(found_loss, float(loss.detach()), relative=LOSS)
    assert found.keys() == set(names)
    for parameter, gradient in zip(names, expected, strict=True):
        assert_close(found[parameter], gradient, relative=GRADIENT, name=parameter)
