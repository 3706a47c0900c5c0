"""Steps of the torch engine for `launch.bench`: built as `launch.train` does, on random rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from launch.bench_models import build
from launch.bench_rows import Setting
from models.config import NeuronKind, SpikingConfig
from models.sequence import SequenceContext
from models.spiking.neurons import Spikes
from parallel.config import ParallelConfig, Recompute
from parallel.engine import TorchEngine
from parallel.mesh import Mesh
from training.config import OptimizerConfig, RunConfig, StageConfig, TrainingConfig
from training.engine_setup import DTYPES, build_engine
from training.microbatch import Rows, microbatches, rank_share
from training.origin import Origin

ROWS = 8
"""Of a step, each a microbatch: enough for four stages, and for four ranks with two each."""
SPIKES = Spikes(k=3.0)
LEARNING_RATE = 1e-4
STAGE = "main"


def run_config(
    setting: Setting, parallel: ParallelConfig, *, num_tokens: int | None = None
) -> RunConfig:
    """The run that is measured: `num_tokens` a step on all ranks, spiking, AdamW with clipping.

    Tokens are those of the setting by default.
    """
    length = (num_tokens or setting.parallel_tokens) // ROWS
    precision = next(name for name, dtype in DTYPES.items() if dtype is setting.dtype)
    stage = StageConfig(
        sequence_length=length, steps=1, global_batch_tokens=ROWS * length, lr=LEARNING_RATE
    )
    return RunConfig(
        experiment="bench",
        run_dir="",
        model=setting.model,
        stages={STAGE: stage},
        spiking=SpikingConfig(neuron=NeuronKind.adaptive),
        parallel=parallel,
        training=TrainingConfig(
            precision=precision,
            recompute=Recompute.full if setting.recompute else Recompute.none,
        ),
    )


@dataclass(frozen=True, slots=True)
class EngineRun:
    """An engine and this rank's rows, the same ones every step. Every method is collective."""

    engine: TorchEngine
    rows: Sequence[Rows]
    num_targets: int

    @classmethod
    def start(cls, config: RunConfig, setting: Setting, mesh: Mesh) -> EngineRun:
        """Random weights from the run's seed."""
        origin = Origin(
            resume=None, manifest={}, source=None, new_parameters=(), run_id="", weights=None
        )
        tokens = step_tokens(config)
        rows = Rows(tokens, tokens.roll(-1, dims=1), torch.zeros_like(tokens))
        share = rank_share(rows, rank=mesh.dp_rank, size=mesh.dp_size)
        return cls(
            engine=build_engine(config, setting.backend, mesh, origin),
            rows=list(microbatches(share, config.training.microbatch_rows)),
            num_targets=tokens.numel(),
        )

    def step(self) -> tuple[float, float]:
        """One optimizer step; its loss and gradient norm."""
        losses = self.engine.forward_backward(
            self.rows, num_targets=self.num_targets, spikes=SPIKES
        )
        return losses["loss"], self.engine.clip_and_step(LEARNING_RATE)


def step_tokens(config: RunConfig) -> Tensor:
    """Seeded tokens `[ROWS, T]` of a step on all ranks."""
    stage = config.stages[STAGE]
    shape = (stage.rows_per_step, stage.sequence_length)
    generator = torch.Generator().manual_seed(2)
    return torch.randint(config.model.vocab_size, shape, generator=generator)


def plain_step(config: RunConfig, setting: Setting) -> Callable[[], tuple[float, float]]:
    """The same step as a plain loop: the model, torch's clipping and AdamW, nothing else of ours.

    Weights are kept in the compute dtype, without a master copy.
    """
    model = build(setting)
    rule = OptimizerConfig()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(rule.beta1, rule.beta2), fused=True
    )
    tokens = step_tokens(config)
    rows = [
        (row.to(setting.device), row.roll(-1, dims=1).to(setting.device)) for row in tokens[:, None]
    ]
    sequence = SequenceContext.one_document_per_row(1, tokens.shape[1], device=setting.device)

    def work() -> tuple[float, float]:
        total = torch.zeros((), dtype=torch.float64, device=setting.device)
        for row, labels in rows:
            loss = model(row, sequence, labels=labels, spikes=SPIKES) / tokens.numel()
            loss.backward()
            total += loss.detach()
        assert rule.clip_norm is not None
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), rule.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return total.item(), norm.item()

    return work
