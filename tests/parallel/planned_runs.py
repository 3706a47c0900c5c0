"""Real steps of what a planner reasons about: a job on a layout, engine and rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.config import ModelConfig, NeuronKind, SpikingConfig
from models.layouts import parameter_layouts
from models.spiking.neurons import Spikes
from parallel.backend.cpu import CpuBackend
from parallel.config import ParallelConfig, Precision
from parallel.engine import ParamGroup, TorchEngine
from parallel.mesh import Mesh, init
from parallel.pipeline_cut import cut
from parallel.planned import Assignment, Job, Layout
from tests.parallel.engine_cases import Rows, Rule

SPIKING = SpikingConfig(neuron=NeuronKind.adaptive)


def job_of(**changes: Any) -> Job:
    """A tiny job: four layers of every kind of mixer, rows of one document."""
    model: dict[str, Any] = {
        "vocab_size": 515, "hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "qkv_bias": True, "window_tokens": 16,
        "mixers": "L S F L", "ffns": "d*4",
    }  # fmt: skip
    values: dict[str, Any] = {
        "precision": Precision.fp32, "length": 64, "rows": 8, "microbatch_rows": 2,
        "loss_chunk_tokens": 48,
    }  # fmt: skip
    values |= changes
    values["model"] = ModelConfig(**(model | changes.get("model", {})))
    return Job(**values)


@dataclass(frozen=True)
class RealRun:
    """An engine for a job on this rank, and its steps."""

    job: Job
    layout: Layout
    mesh: Mesh
    engine: TorchEngine

    @classmethod
    def start(cls, job: Job, parallel: ParallelConfig) -> RealRun:
        alone = None if torch.distributed.is_initialized() else {}
        mesh = init(CpuBackend(), parallel, environment=alone)
        layout = Layout.of(parallel, mesh.size)
        layouts = parameter_layouts(job.model)
        trained = [n for n, layout in layouts.items() if not (layout.is_state or n in job.frozen)]
        engine = TorchEngine(
            job.model,
            mesh=mesh,
            groups=[ParamGroup(tuple(trained), weight_decay=0.1, lr_factor=1.0)],
            rule=Rule(),
            parallel=parallel,
            stages=cut(job.model, parallel, sequence_length=job.length),
            spiking=job.spiking,
            precision=job.precision,
            recompute=job.recompute,
            seed=1,
            loss_chunk_tokens=job.loss_chunk_tokens,
        )
        return cls(job, layout, mesh, engine)

    @property
    def given(self) -> Assignment:
        """What a planner says about this rank."""
        shard_rank = self.mesh.place_of(self.mesh.rank).dp_shard
        return Assignment.of(self.job, self.layout, shard_rank=shard_rank)

    def rows(self, step: int) -> list[Rows]:
        """This rank's microbatches."""
        job = self.job
        generator = torch.Generator().manual_seed(step)
        shape = (job.rows // self.layout.dp, job.length)
        tokens = torch.randint(job.model.vocab_size, shape, generator=generator)
        parts = tokens.split(job.microbatch_rows)
        return [Rows(part, part.roll(-1, 1), torch.zeros_like(part)) for part in parts]

    def backward(self, step: int = 0) -> None:
        """Forward and backward over all microbatches."""
        spikes = Spikes(3.0) if self.job.is_spiking else None
        targets = self.job.rows * self.job.length
        self.engine.forward_backward(self.rows(step), num_targets=targets, spikes=spikes)

    def step(self, step: int = 0) -> None:
        """The whole step."""
        self.backward(step)
        self.engine.clip_and_step(1e-3)


def storage_bytes(tensors: list[Tensor]) -> int:
    """Of distinct storages, padding included."""
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(sizes.values())
