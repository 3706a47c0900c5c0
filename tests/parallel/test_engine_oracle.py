"""The one comparison of runs sees every number that differs, and the oracle remembers its runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from models.expert_config import ExpertConfig
from parallel.config import Shard
from tests.parallel.engine_cases import LEVELS, STEPS, Case, Run
from tests.parallel.engine_oracle import (
    assert_same_run,
    assert_same_spikes,
    expected_run,
    oracle_statistics,
)

CASE = Case(is_cuttable=True, moe=ExpertConfig(num_experts=4, balance_coefficient=0.5))
NAME = "blocks.1.ffn.router.weight"
OFF = 1 + 1e-8


def last(values: tuple[float, ...]) -> tuple[float, ...]:
    return (*values[:-1], values[-1] * OFF)


CHANGES: dict[str, Callable[[Run], Run]] = {
    "losses": lambda run: replace(run, losses=last(run.losses)),
    "norms": lambda run: replace(run, norms=last(run.norms)),
    "gradients": lambda run: replace(
        run, gradients={**run.gradients, NAME: run.gradients[NAME] * OFF}
    ),
    "a gradient less": lambda run: replace(
        run, gradients={n: g for n, g in run.gradients.items() if n != NAME}
    ),
    "parameters": lambda run: replace(
        run, parameters={**run.parameters, NAME: run.parameters[NAME] * OFF}
    ),
    "routing": lambda run: replace(
        run, routing=tuple({n: v * OFF for n, v in step.items()} for step in run.routing)
    ),
    "a step less": lambda run: replace(run, routing=run.routing[1:]),
}


def test_a_run_is_the_same_as_itself() -> None:
    run = expected_run(CASE)
    assert len(run.losses) == len(run.norms) == len(run.routing) == STEPS
    assert_same_run(run, run)


@pytest.mark.parametrize("change", CHANGES)
def test_each_number_that_differs_is_seen(change: str) -> None:
    run = expected_run(CASE)
    with pytest.raises((AssertionError, ValueError)):
        assert_same_run(CHANGES[change](run), run)


def test_spikes_that_differ_are_seen() -> None:
    """By a layout's own case, whose microbatches count."""
    case = replace(CASE, parallel=LEVELS[Shard.none], microbatch_rows=2)
    counted = oracle_statistics(replace(CASE, microbatch_rows=2))
    run = replace(expected_run(CASE), statistics=counted)
    assert_same_spikes(run, case)
    name = next(iter(counted))
    for wrong in ({**counted, name: counted[name] + 1}, {}):
        with pytest.raises(AssertionError):
            assert_same_spikes(replace(run, statistics=wrong), case)
    with pytest.raises(AssertionError):
        assert_same_spikes(run, replace(case, spiking=False))
