"""The torch engine: tensor parallel layers, FSDP2 and a pipeline behind the engine's verbs.

Owns the model's materialisation, what is collected from ranks after a backward, and the update. The
loop never learns how ranks are laid out; nothing here reads or writes files.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.config import ModelConfig, SpikingConfig
from models.layers import ParamLayout
from models.layouts import parameter_layouts
from models.model import Model
from models.recomputation import NOTHING, Recomputation
from parallel import step_numbers
from parallel.assembly import Blueprint, build_parts, build_teacher, materialise, own_parts
from parallel.boxes import Box
from parallel.config import ParallelConfig, Precision
from parallel.engine_protocol import Engine, Microbatch, ParamGroup, UpdateRule
from parallel.fully_sharded import compute_dtype
from parallel.gradients import NonFiniteError, clip, global_norm, missing, number, refuse_missing
from parallel.local_optimizer import LocalOptimizer
from parallel.mesh import Mesh
from parallel.pipeline import PipelineRunner
from parallel.pipeline_cut import StageCut
from parallel.rank_parameters import RankParameters
from parallel.router_steps import RouterSteps
from parallel.runner import Runner, SequentialRunner, Work
from parallel.stage import StageModel
from parallel.teacher import TeacherSpec

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
        teacher: a frozen model to learn from; `self.teacher.parameters` wait for its weights.
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
        teacher: TeacherSpec | None = None,
        loss_chunk_tokens: int = 1024,
    ) -> None:
        self.mesh, self._clip_norm = mesh, rule.clip_norm
        self._layout = layout = ParallelConfig() if parallel is None else parallel
        layouts = parameter_layouts(config, sequence_parallel=layout.sequence_parallel)
        _check_known(groups, layouts)
        blueprint = Blueprint(
            config=config,
            spiking=spiking,
            precision=precision,
            kernels=kernels,
            recompute=recompute,
            loss_chunk_tokens=loss_chunk_tokens,
        )
        parts = own_parts(config, stages, mesh)
        kind = Model if mesh.pp_size == 1 else StageModel
        self.parts = build_parts(blueprint, parts, groups, layout, mesh, kind=kind)
        self._own = RankParameters.of(self.parts, layouts, mesh)
        materialise(self.parts, self._own, mesh.device, seed=seed)
        self._routers = RouterSteps(config, self._own)
        self._optimizer = LocalOptimizer(self._own.parameters, groups, rule)
        self.teacher = (
            None if teacher is None else build_teacher(teacher, blueprint, parts, layout, mesh)
        )
        self._runner = self._build_runner(layout, stages, compute_dtype(precision))

    def forward_backward(
        self,
        microbatches: Sequence[Microbatch],
        *,
        num_targets: int,
        spikes: Spikes | None = None,
    ) -> dict[str, float]:
        """Gradients of the summed losses of all ranks' rows over `num_targets`.

        Args:
            microbatches: this rank's rows, as many microbatches as on every other rank.
            num_targets: unmasked labels of all ranks and microbatches (`sum_over_ranks`).
            spikes: how the neurons fire, None for continuous activations.

        Returns:
            `loss`, the cross entropy a target; with a teacher `distill/kl` and `distill/hidden`,
            before their weights; with expert layers the metrics of `models.routing` as `moe/...`.

        Raises:
            ValueError: ranks that disagree on either number, or a trained parameter without a
                gradient; on every rank alike.
            NonFiniteError: on every rank alike; gradients are dropped, nothing else has changed.
        """
        size = step_numbers.agree_on_size(self.mesh, microbatches, num_targets)
        routing = self._routers.begin(num_rows=size[0], num_tokens=size[1])
        self._own.drop_gradients()
        sums = self._runner.train(microbatches, Work(num_targets, spikes, routing))
        without = number(missing(self._own.gradients()), self._own.shares())
        rows = self.mesh.gather_numbers((*sums.tolist(), without))
        for rank, (loss, kl, hidden, _) in enumerate(rows):
            if not math.isfinite(loss + kl + hidden):
                self._own.drop_gradients()
                raise NonFiniteError("loss", loss + kl + hidden, rank=rank, parameter=None)
        refuse_missing([row[3] for row in rows], self._own.shares())
        self._own.complete_gradients()
        return self._losses(rows, num_targets) | self._routers.collect()

    def _losses(self, rows: Sequence[Sequence[float]], num_targets: int) -> dict[str, float]:
        """Sums over the ranks that each number is to be counted on."""
        last = self.mesh.ranks_at(pp=self.mesh.pp_size - 1, tp=0)
        losses = {"loss": sum(rows[rank][0] for rank in last) / num_targets}
        if self.teacher is not None:
            # Every stage has layers; with sequence parallelism every tp rank has tokens.
            tp_ranks = range(self.mesh.tp_size if self._layout.sequence_parallel else 1)
            places = itertools.product(range(self.mesh.pp_size), tp_ranks)
            layers = [rank for pp, tp in places for rank in self.mesh.ranks_at(pp=pp, tp=tp)]
            losses["distill/kl"] = sum(rows[rank][1] for rank in last) / num_targets
            losses["distill/hidden"] = sum(rows[rank][2] for rank in layers) / num_targets
        return losses

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
            self._routers.move_states()
        finally:
            self._own.drop_gradients()
        return norm

    def expert_loads(self) -> dict[str, float]:
        """Each expert's share of the choices of the last step, as `moe/<layer>/load_<expert>`."""
        return self._routers.loads()

    def token_losses(self, batch: Microbatch, *, spikes: Spikes | None = None) -> Tensor:
        """Loss of each token `[rows, T]` of this rank's rows, 0 where masked, on the CPU."""
        with torch.no_grad():
            return self._runner.token_losses(batch, spikes).cpu()

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Sum of small CPU tensors over data-parallel ranks: the same bits on every rank."""
        return self.agree(values, ())[0]

    def agree(self, values: Tensor, flags: Sequence[bool]) -> tuple[Tensor, tuple[bool, ...]]:
        """Sum of `values` over data-parallel ranks, and which flags any rank at all raised."""
        return step_numbers.agree(self.mesh, values, flags)

    def sum_by_name(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sum float64 tensors of one shape over all ranks, where a rank may lack some names."""
        return step_numbers.sum_by_name(self.mesh, values)

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

    def _build_runner(
        self, layout: ParallelConfig, stages: Sequence[StageCut], dtype: torch.dtype
    ) -> Runner:
        if self.mesh.pp_size == 1:
            teacher = None if self.teacher is None else self.teacher.parts[0]
            return SequentialRunner(
                self.parts[0], teacher, shard=layout.shard, device=self.mesh.device
            )
        stages_here = [part for part in self.parts if isinstance(part, StageModel)]
        for index, stage in enumerate(stages_here):
            stage.teacher = None if self.teacher is None else self.teacher.parts[index]
        return PipelineRunner(
            stages_here,
            [stage.index for stage in stages if stage.pp_rank == self.mesh.pp_rank],
            num_stages=len(stages),
            schedule=layout.schedule,
            mesh=self.mesh,
            dtype=dtype,
            token_shares=self.mesh.tp_size if layout.sequence_parallel else 1,
        )


def _check_known(groups: Sequence[ParamGroup], layouts: Mapping[str, ParamLayout]) -> None:
    trainable = {name for name, layout in layouts.items() if not layout.is_state}
    unknown = [name for group in groups for name in group.names if name not in trainable]
    if unknown:
        raise ValueError(f"parameter groups must name parameters of the model: got {unknown[0]}.")
