"""One step on an engine that only remembers what it was asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.config import NeuronKind, SpikingConfig
from models.spiking.neurons import Spikes
from models.spiking.recorder import SpikeRecorder
from parallel.engine_protocol import Microbatch
from parallel.gradients import NonFiniteError
from tests.training.tiny_run import tiny_run
from training.health import TrainingDivergedError
from training.metrics import Throughput
from training.microbatch import Rows
from training.stages import build_plan
from training.state import TrainState, chain
from training.step import Stepper, Work

CONFIG = tiny_run(Path("prepared"), Path("run"))
STAGE = build_plan(CONFIG).stages[0]


COUNTS = [[0.0, 1.0, -3.0, 8.0]]
OTHER_COUNTS = [[0.0, 0.0, 0.0, -9.0]]
"""What the neurons of the other rank fired."""


def recorded(*counts: list[list[float]]) -> SpikeRecorder:
    recorder = SpikeRecorder(9)
    for values in counts:
        recorder.record("0/ffn_in", torch.tensor(values))
    return recorder


class FakeEngine:
    """Two ranks whose other half holds the same rows; may fail as asked."""

    def __init__(self, failure: str | None = None) -> None:
        self.failure = failure
        self.calls: list[dict[str, Any]] = []
        self.rates: list[float] = []

    def forward_backward(
        self, microbatches: Sequence[Microbatch], *, num_targets: int, spikes: Spikes | None = None
    ) -> dict[str, float]:
        self.calls.append({"rows": [part.tokens.shape[0] for part in microbatches],
                           "num_targets": num_targets, "spikes": spikes})  # fmt: skip
        if self.failure == "loss":
            raise NonFiniteError("loss", float("nan"), rank=1, parameter=None)
        if spikes is not None and spikes.recorder is not None:
            spikes.recorder.record("0/ffn_in", torch.tensor(COUNTS))
        return {"loss": 2.5, "distill/kl": 0.25}

    def expert_loads(self) -> dict[str, float]:
        return {"moe/1/load_0": 0.75}

    def clip_and_step(self, lr: float) -> float:
        if self.failure == "gradient":
            raise NonFiniteError("gradient norm", float("inf"), rank=0, parameter="a.weight")
        self.rates.append(lr)
        return 0.75

    def agree(self, values: Tensor, flags: Sequence[bool]) -> tuple[Tensor, tuple[bool, ...]]:
        return values * 2, tuple(flags)

    def sum_by_name(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        other = recorded(OTHER_COUNTS).tensors()
        return {name: value + other[name] for name, value in values.items()}


def stepper(engine: FakeEngine, spiking: SpikingConfig | None = None) -> Stepper:
    times = iter([12.0] * 9)
    return Stepper(
        engine=engine,  # type: ignore[arg-type]
        spiking=spiking or SpikingConfig(),
        throughput=Throughput(CONFIG.model, None),
        window_tokens=3,
        microbatch_rows=2,
        memory_bytes=lambda: 77,
        clock=lambda: next(times),
    )


def rows() -> Rows:
    """Two rows of 8 tokens: documents of 8, and of 5 and 3; three labels are masked."""
    ids = torch.tensor([[0] * 8, [0] * 5 + [1] * 3])
    labels = torch.ones(2, 8, dtype=torch.int64)
    labels[0, 7] = labels[1, 4] = labels[1, 7] = -100
    return Rows(torch.zeros(2, 8, dtype=torch.int64), labels, ids)


def work(found: Stepper, sample_ids: tuple[object, ...] = ("x", "y", "z")) -> Work:
    return Work(rows(), sample_ids, found.agree(rows(), stop=False, saving=False), started=10.0)


def test_ranks_agree_on_targets_visible_keys_and_stopping() -> None:
    agreement = stepper(FakeEngine()).agree(rows(), stop=False, saving=False)
    assert agreement.num_targets == 2 * 13
    full = [*range(1, 9), *range(1, 6), *range(1, 4)]
    assert agreement.visible.full == 2 * sum(full)
    assert agreement.visible.window == 2 * sum(min(keys, 3) for keys in full)
    assert not agreement.is_stop_requested
    assert not agreement.is_saving
    stopping = stepper(FakeEngine()).agree(rows(), stop=True, saving=False)
    assert (stopping.is_stop_requested, stopping.is_saving) == (True, False)
    saving = stepper(FakeEngine()).agree(rows(), stop=False, saving=True)
    assert (saving.is_stop_requested, saving.is_saving) == (False, True)


def test_a_step_updates_once_and_describes_itself() -> None:
    engine = FakeEngine()
    found = stepper(engine)
    state, row = found.step(TrainState(step=1, tokens=64), STAGE, work(found))
    assert engine.calls == [{"rows": [2], "num_targets": 26, "spikes": None}]
    assert engine.rates == [STAGE.learning_rate(1)]
    assert (state.step, state.tokens) == (2, 128)
    assert row == {
        "step": 2, "tokens": 128, "loss": 2.5, "distill/kl": 0.25, "grad_norm": 0.75,
        "lr": STAGE.learning_rate(1),
        "tokens_per_second": 32.0, "mfu": None, "mfu_6n": None, "memory_bytes": 77,
        "sample_hash": chain(TrainState().sample_hash, ["x", "y", "z"]), "stage": "short",
    }  # fmt: skip


SPIKING = SpikingConfig(
    neuron=NeuronKind.adaptive, start_step=3, k_start=6.0, anneal_steps=4,
    statistics_interval_steps=5,
)  # fmt: skip


def test_spikes_follow_the_schedule_and_are_recorded_when_due() -> None:
    engine = FakeEngine()
    found = stepper(engine, SPIKING)
    for step in range(7):
        _, row = found.step(TrainState(step=step), STAGE, work(found))
        spikes = engine.calls[-1]["spikes"]
        assert (spikes is None) is (step < 3)
        if spikes is not None:
            assert spikes.k == pytest.approx(6.0 - 3.0 * min(1.0, (step - 3) / 4))
            assert (spikes.recorder is not None) is (step in (3, 4))
        assert any(key.startswith("spike/") for key in row) is (step in (3, 4))
        assert ("moe/1/load_0" in row) is (step in (0, 4))


def test_statistics_are_of_all_ranks_together() -> None:
    found = stepper(FakeEngine(), SPIKING)
    _, row = found.step(TrainState(step=4), STAGE, work(found))
    together = recorded(COUNTS, OTHER_COUNTS).summary()
    expected = {f"spike/{name}": value for name, value in together.items()}
    assert {key: row[key] for key in row if key.startswith("spike/")} == expected
    assert row["spike/0/ffn_in/silent_share"] == 0.5


def test_statistics_can_be_switched_off() -> None:
    silent = SpikingConfig(neuron=NeuronKind.adaptive, statistics_interval_steps=0)
    engine = FakeEngine()
    found = stepper(engine, silent)
    _, row = found.step(TrainState(), STAGE, work(found))
    assert engine.calls[0]["spikes"].recorder is None
    assert "moe/1/load_0" not in row


@pytest.mark.parametrize("failure", ["loss", "gradient"])
def test_what_is_not_finite_names_step_stage_and_samples(failure: str) -> None:
    engine = FakeEngine(failure)
    found = stepper(engine)
    message = rf"{failure}.* must be finite: .*At step 8 of stage short, on samples x, y, z\."
    with pytest.raises(TrainingDivergedError, match=message):
        found.step(TrainState(step=7), STAGE, work(found))
    assert engine.rates == []
