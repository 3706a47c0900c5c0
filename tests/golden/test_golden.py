"""Losses of tiny runs, stored as text: a change that should not change numbers proves it here.

Synthetic tokens from integer arithmetic, float64, one thread, so that neither corpus nor machine
matters. SYNFIRE_WRITE_GOLDEN=1 writes the files anew, for a change that is meant to change numbers.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from launch.compose import load_config
from models.layouts import parameter_layouts
from models.spiking.schedule import spikes_at
from parallel.backend.cpu import CpuBackend
from parallel.engine import TorchEngine
from parallel.mesh import init
from tests.support.distributed import run_ranks
from training.config import RunConfig
from training.lr_schedule import learning_rate
from training.optimizer import build_groups

HERE = Path(__file__).resolve().parent
STEPS = 20
RUNS = {
    "hybrid_spiking": ["experiment=smoke", "spiking.start_step=10", "spiking.blend_steps=4"],
    "branches_spiking": [
        "experiment=smoke", "model.mixers=[L+S L+F]*2", "model.linear.gate=key_tied",
        "model.linear.feature_map=sigmoid", "model.linear.gate_offset=1",
        "model.branches.merge=learned",
    ],
    "transformer": ["experiment=smoke", "spiking=off", "model.mixers=F*4", "model.qk_norm=true"],
}  # fmt: skip


def rows_of(step: int, *, vocab_size: int) -> SimpleNamespace:
    """4 rows x 48 tokens of a linear congruential generator, two documents in each odd row."""
    state, values = 12345 + 977 * step, []
    for _ in range(4 * 49):
        state = (1103515245 * state + 12345) % 2**31
        values.append((state >> 8) % 37 % vocab_size)
    table = torch.tensor(values).reshape(4, 49)
    documents = torch.zeros(4, 48, dtype=torch.int64)
    documents[1::2, 20:] = 1
    labels = table[:, 1:].clone()
    labels[1::2, 19] = -100
    return SimpleNamespace(tokens=table[:, :-1], labels=labels, document_ids=documents)


def losses_of(rank: int, world_size: int, overrides: list[str]) -> list[float]:
    torch.set_num_threads(1)
    config = load_config("train", RunConfig, overrides)
    mesh = init(CpuBackend(), config.parallel)
    engine = TorchEngine(
        config.model,
        mesh=mesh,
        groups=build_groups(list(parameter_layouts(config.model)), config.optimizer),
        rule=config.optimizer,
        spiking=config.spiking,
        precision=config.training.precision,
        seed=config.seed,
    )
    losses = []
    for step in range(STEPS):
        rows = rows_of(step, vocab_size=config.model.vocab_size)
        targets = int((rows.labels >= 0).sum())
        spikes = spikes_at(config.spiking, step)
        losses.append(engine.forward_backward([rows], num_targets=targets, spikes=spikes)["loss"])
        engine.clip_and_step(
            learning_rate(step + 1, peak=2e-3, num_steps=STEPS, schedule=config.schedule)
        )
    return losses


@pytest.mark.parametrize("name", sorted(RUNS))
def test_losses_are_the_stored_ones(name: str, tmp_path: Path) -> None:
    (losses,) = run_ranks(losses_of, 1, RUNS[name], tmp_path=tmp_path)
    path = HERE / f"{name}.txt"
    if os.environ.get("SYNFIRE_WRITE_GOLDEN"):
        path.write_text("".join(f"{loss!r}\n" for loss in losses))
    stored = [float(line) for line in path.read_text().splitlines()]
    assert len(stored) == STEPS
    assert losses == pytest.approx(stored, rel=1e-9, abs=0.0)
