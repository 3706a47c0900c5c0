"""The torch engine: tensor parallel layers, FSDP2 and a pipeline behind the engine's verbs.

Owns the model's materialisation, what is collected from ranks after a backward, and the update. The
loop never learns how ranks are laid out; nothing here reads or writes files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from models.config import ModelConfig, SpikingConfig
from models.initialisation import tensor_for
from models.layers import LayerProvider, ParamLayout
from models.layouts import parameter_layouts
from models.model import Model
from models.recomputation import NOTHING, Recomputation
from parallel.boxes import Box, local_of
from parallel.config import ParallelConfig, PipelineSchedule, Precision, Shard
from parallel.engine_protocol import Engine, Microbatch, ParamGroup, UpdateRule
from parallel.fully_sharded import compute_dtype, master_dtype, shard_model
from parallel.gradients import NonFiniteError, clip, global_norm, missing, number, refuse_missing
from parallel.local_optimizer import LocalOptimizer
from parallel.mesh import Mesh
from parallel.pipeline import PipelineRunner, StageModel
from parallel.pipeline_cut import StageCut
from parallel.rank_parameters import RankParameters, global_names
from parallel.runner import Runner, SequentialRunner, Work
from parallel.tensor_parallel import TensorParallelLayers

if TYPE_CHECKING:
    from models.kernels import KernelSet
    from models.spiking.neurons import Spikes

__all__ = ["Engine", "Microbatch", "NonFiniteError", "ParamGroup", "TorchEngine", "UpdateRule"]


class TorchEngine:
    """The model of one rank under any layout of `mesh`, also of one process.

    Args:
        config: the model.
        spiking: neuron at the inputs of projections.
        mesh: this process's place.
        parallel: shard level, schedule, sequence parallelism.
        stages: where the layers lie; needed when `mesh` has a pipeline axis.
        precision: compute dtype; parameters at rest are float32 (float64 for fp64).
        groups: trained parameters; all others are frozen and have no optimizer state.
        rule: update rule and clip norm.
        kernels: attention kernels.
        recompute: what is computed again in the backward pass.
        seed: draws every parameter; None leaves NaN for a checkpoint to fill.
        loss_chunk_tokens: tokens whose logits exist at a time.

    Raises:
        ValueError: a group that names an unknown parameter, or one parameter twice.
    """

    def __init__(  # noqa: PLR0913 - the composition root of an engine
        self,
        config: ModelConfig,
        *,
        mesh: Mesh,
        groups: Sequence[ParamGroup],
        rule: UpdateRule,
        parallel: ParallelConfig | None = None,
        stages: Sequence[StageCut] = (),
        spiking: SpikingConfig | None = None,
        precision: Precision = Precision.fp32,
        kernels: KernelSet | None = None,
        recompute: Recomputation = NOTHING,
        seed: int | None = None,
        loss_chunk_tokens: int = 1024,
    ) -> None:
        self.mesh, self._clip_norm = mesh, rule.clip_norm
        layout = ParallelConfig() if parallel is None else parallel
        layouts = parameter_layouts(config, sequence_parallel=layout.sequence_parallel)
        _check_known(groups, layouts)
        here = [stage for stage in stages if stage.pp_rank == mesh.pp_rank]
        is_pipelined = mesh.pp_size > 1
        parts = [stage.part for stage in here] if is_pipelined else [None]
        with torch.device("meta"):
            self.parts: list[Model] = [
                (StageModel if is_pipelined else Model)(
                    config,
                    spiking=spiking,
                    kernels=kernels,
                    layers=_provider(mesh, layout),
                    recompute=recompute,
                    part=part,
                    loss_chunk_tokens=loss_chunk_tokens,
                )
                for part in parts
            ]
        for part in self.parts:
            assert not list(part.buffers()), "a buffer would be lost on the meta device"
            part.to(master_dtype(precision))
            _freeze(part, groups)
            shard_model(part, mesh, precision=precision, shard=_shard_level(layout, mesh))
        self._own = RankParameters.of(self.parts, layouts, mesh)
        self._materialise(seed)
        self._optimizer = LocalOptimizer(self._own.parameters, groups, rule)
        self._runner = self._build_runner(layout, stages, compute_dtype(precision))

    def forward_backward(
        self,
        microbatches: Sequence[Microbatch],
        *,
        num_targets: int,
        spikes: Spikes | None = None,
    ) -> float:
        """Gradients of the summed loss of all ranks' rows over `num_targets`; returns that loss.

        Args:
            microbatches: this rank's rows, as many microbatches as on every other rank.
            num_targets: unmasked labels of all ranks and microbatches (`sum_over_ranks`).
            spikes: how the neurons fire, None for continuous activations.

        Raises:
            ValueError: ranks that disagree on either number, or a trained parameter without a
                gradient; on every rank alike.
            NonFiniteError: on every rank alike; gradients are dropped, nothing else has changed.
        """
        self._check_agreement(len(microbatches), num_targets)
        self._own.drop_gradients()
        total = self._runner.train(microbatches, Work(num_targets, spikes))
        without = number(missing(self._own.gradients()), self._own.shares())
        rows = self.mesh.gather_numbers((float(total), without))
        losses = [row[0] for row in rows]
        for rank, loss in enumerate(losses):
            if not math.isfinite(loss):
                self._own.drop_gradients()
                raise NonFiniteError("loss", loss, rank=rank, parameter=None)
        refuse_missing([row[1] for row in rows], self._own.shares())
        self._own.complete_gradients()
        with_loss = self.mesh.ranks_at(pp=self.mesh.pp_size - 1, tp=0)
        return sum(losses[rank] for rank in with_loss) / num_targets

    def clip_and_step(self, lr: float) -> float:
        """Clip, update, forget the gradients.

        Args:
            lr: learning rate of this step, before the groups' factors.

        Returns:
            The norm of the whole gradient before clipping.

        Raises:
            ValueError: a trained parameter without a gradient.
            NonFiniteError: a gradient that is not finite. Nothing has been updated in either case.
        """
        gradients = self._own.gradients()
        try:
            norm = global_norm(gradients, self._own.shares(), self.mesh)
            present = {name: value for name, value in gradients.items() if value is not None}
            clip(list(present.values()), norm, self._clip_norm)
            self._optimizer.update(present, lr)
        finally:
            self._own.drop_gradients()
        return norm

    def token_losses(self, batch: Microbatch, *, spikes: Spikes | None = None) -> Tensor:
        """Loss of each token `[rows, T]` of this rank's rows, 0 where masked, on the CPU."""
        with torch.no_grad():
            return self._runner.token_losses(batch, spikes).cpu()

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Sum of small CPU tensors over data-parallel ranks: the same bits on every rank."""
        return self.agree(values, False)[0]

    def agree(self, values: Tensor, flag: bool) -> tuple[Tensor, bool]:
        """Sum of `values` over data-parallel ranks, and whether any rank at all raised its flag."""
        row = torch.cat([values.reshape(-1).double(), torch.tensor([float(flag)])])
        rows = torch.tensor(self.mesh.gather_numbers(row.tolist()), dtype=torch.float64)
        total = rows[self.mesh.ranks_at(pp=0, tp=0)].sum(dim=0)
        return total[:-1].reshape(values.shape), bool(rows[:, -1].any())

    def sum_by_name(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sum float64 tensors of one shape over all ranks, where a rank may lack some names.

        Exact, so equal on every rank and for every layout, for whole numbers below 2^53.
        """
        names = sorted({name for names in self.mesh.gather(sorted(values)) for name in names})
        if not names:
            return {}
        zero = torch.zeros_like(next(iter(values.values()))) if values else None
        shape = next(s for s in self.mesh.gather(None if zero is None else tuple(zero.shape)) if s)
        table = torch.stack([values.get(name, torch.zeros(shape)).cpu().double() for name in names])
        if self.mesh.size > 1:
            table = table.to(self.mesh.device)
            dist.all_reduce(table, group=self.mesh.group)
        return dict(zip(names, table.cpu(), strict=True))

    @property
    def parameters(self) -> dict[str, Box]:
        """This rank's part of every parameter that it holds, in memory shared with the model."""
        return {name: self._own.box(name) for name in self._own}

    def optimizer_state(self) -> dict[str, Box]:
        """This rank's part of the optimizer state as `<state>/<parameter>`, shared likewise."""
        return {
            f"{moment}/{name}": self._own.box(name, values)
            for moment, name, values in self._optimizer.state()
        }

    @property
    def num_updates(self) -> int:
        """Updates so far; the one scalar of the optimizer state."""
        return self._optimizer.num_updates

    @num_updates.setter
    def num_updates(self, value: int) -> None:
        self._optimizer.num_updates = value

    def gradients(self) -> dict[str, Box]:
        """This rank's part of each gradient that exists, between backward and step (for tests)."""
        return {
            name: self._own.box(name, gradient)
            for name, gradient in self._own.gradients().items()
            if gradient is not None
        }

    def _materialise(self, seed: int | None) -> None:
        """Give every parameter memory and either its drawn values or NaN; padding is 0."""
        config = self.parts[0].config
        for part in self.parts:
            part.to_empty(device=self.mesh.device)
        for name, parameter in self._own.parameters.items():
            with torch.no_grad():
                local_of(parameter).zero_()
            box = self._own.box(name)
            if seed is None:
                box.local.fill_(math.nan)
            else:
                box.fill(tensor_for(name, self._own.layouts[name], config, seed))

    def _build_runner(
        self, layout: ParallelConfig, stages: Sequence[StageCut], dtype: torch.dtype
    ) -> Runner:
        if self.mesh.pp_size == 1:
            return SequentialRunner(self.parts[0], shard=layout.shard, device=self.mesh.device)
        return PipelineRunner(
            [part for part in self.parts if isinstance(part, StageModel)],
            [stage.index for stage in stages if stage.pp_rank == self.mesh.pp_rank],
            num_stages=len(stages),
            schedule=layout.schedule,
            mesh=self.mesh,
            dtype=dtype,
            token_shares=self.mesh.tp_size if layout.sequence_parallel else 1,
        )

    def _check_agreement(self, num_microbatches: int, num_targets: int) -> None:
        """Ranks that disagree would hang in a collective or train on another loss."""
        rows = self.mesh.gather_numbers((num_microbatches, num_targets))
        for index, name in enumerate(("microbatches", "num_targets")):
            values = [row[index] for row in rows]
            if len(set(values)) > 1:
                raise ValueError(
                    f"{name} ({[int(value) for value in values]}, one entry a rank) must be the "
                    "same on every rank. Give each rank as many rows, and num_targets summed over "
                    "ranks."
                )
        if num_microbatches < 1 or num_targets < 1:
            raise ValueError(
                f"microbatches ({num_microbatches}) and num_targets ({num_targets}) must be at "
                "least 1: this step has nothing to learn from."
            )


def _provider(mesh: Mesh, layout: ParallelConfig) -> LayerProvider | None:
    """Cut layers where there is a tensor-parallel axis, plain ones otherwise."""
    if mesh.tp_size == 1:
        return None
    return TensorParallelLayers(
        mesh.tp_group,
        sequence_parallel=layout.sequence_parallel,
        vocab_multiple=layout.vocab_multiple,
    )


def _shard_level(layout: ParallelConfig, mesh: Mesh) -> Shard:
    """zero_bubble loses gradients of resharded parameters without a word (measured; torch 2.13)."""
    if mesh.pp_size > 1 and layout.schedule is PipelineSchedule.zero_bubble:
        return Shard.gradients if layout.shard is Shard.parameters else layout.shard
    return layout.shard


def _check_known(groups: Sequence[ParamGroup], layouts: Mapping[str, ParamLayout]) -> None:
    unknown = [name for group in groups for name in group.names if name not in layouts]
    if unknown:
        raise ValueError(f"parameter groups must name parameters of the model: got {unknown[0]}.")


def _freeze(part: Model, groups: Sequence[ParamGroup]) -> None:
    trained = {name for group in groups for name in group.names}
    for name, parameter in global_names(part):
        parameter.requires_grad_(name in trained)
