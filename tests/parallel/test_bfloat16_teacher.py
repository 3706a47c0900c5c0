"""A teacher under bfloat16, where FSDP casts what enters a forward: near float64 in every layout.

The matrix compares teachers in float64 only, where nothing is cast.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from models.lesson import Goals
from parallel.backend.cpu import CpuBackend
from parallel.config import ParallelConfig, Precision, Shard
from parallel.mesh import init
from tests.parallel.engine_cases import Case, build_engine, gather, rows_of, share_of
from tests.support.closeness import assert_close
from tests.support.distributed import run_ranks

LOSS = 2.0**-8
"""One bfloat16 number's rounding; errors of many tokens average out to less."""
GRADIENT = 2.0**-4
"""Of the largest entry, with the roundings of the whole way there."""
LATE = ("head.weight", "blocks.3.ffn.down_proj.weight")
"""Parameters behind every head norm, which amplifies rounding (see `cuttable_config`)."""


def case(*, offload: bool = False, **axes: Any) -> Case:
    """Without spikes, whose counts flip in the last bit."""
    return Case(
        parallel=ParallelConfig(vocab_multiple=4, **axes),
        is_cuttable=True,
        microbatch_rows=2,
        spiking=False,
        teacher=Goals(kl=0.5, hidden=0.25, temperature=2.0),
        offload=offload,
        precision=Precision.bf16,
    )


CASES: dict[int, dict[str, Case]] = {
    1: {
        "float64": replace(case(), precision=Precision.fp64),
        "one": case(),
        "one offloaded": case(offload=True),
    },
    2: {
        "dp2": case(),
        "dp2 parameters offloaded": case(shard=Shard.parameters, offload=True),
        "tp2": case(tp=2),
        "tp2 sequence": case(tp=2, sequence_parallel=True),
        "pp2": case(pp=2),
    },
}
NARROW = [name for cases in CASES.values() for name in cases if name != "float64"]
ROUNDED_ALIKE = [name for name in NARROW if "tp2" not in name and name != "one"]


@dataclass(frozen=True)
class Step:
    """What a first step computed."""

    losses: dict[str, float]
    gradients: dict[str, Tensor]


def steps_of(rank: int, world_size: int) -> dict[str, Step]:
    """The first step of every case."""
    steps: dict[str, Step] = {}
    for name, each in CASES[world_size].items():
        mesh = init(CpuBackend(), each.parallel)
        engine, rows = build_engine(mesh, each), rows_of(0)
        losses = engine.forward_backward(
            share_of(rows, mesh.dp_rank, mesh.dp_size, each.microbatch_rows),
            num_targets=int((rows.labels != -100).sum()),
        )
        gradients = gather(mesh, engine.gradients())
        steps[name] = Step(losses, {late: gradients[late] for late in LATE})
    return steps


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Step]:
    folder: Path = tmp_path_factory.mktemp("bfloat16")
    found: dict[str, Step] = {}
    for size in CASES:
        found |= run_ranks(steps_of, size, tmp_path=folder)[0]
    return found


@pytest.mark.parametrize("name", NARROW)
def test_a_step_is_near_float64(steps: dict[str, Step], name: str) -> None:
    found, expected = steps[name], steps["float64"]
    assert set(found.losses) == {"loss", "distill/kl", "distill/hidden"}
    for key, value in expected.losses.items():
        assert value > 0
        assert_close(found.losses[key], value, relative=LOSS, name=key)
    for key, gradient in expected.gradients.items():
        assert_close(found.gradients[key], gradient, relative=GRADIENT, name=key)


@pytest.mark.parametrize("name", ROUNDED_ALIKE)
def test_microbatches_computed_elsewhere_have_the_same_sums(
    steps: dict[str, Step], name: str
) -> None:
    """Only the order of float64 additions may differ: nothing is added up in bfloat16."""
    for key, value in steps["one"].losses.items():
        assert_close(steps[name].losses[key], value, relative=1e-12, name=key)
