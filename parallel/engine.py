"""The torch engine: FSDP2 behind the verbs of `parallel.engine_protocol`.

Owns the model's materialisation, forward and backward over microbatches, gradient checks and the
update. The loop never learns how many ranks there are; nothing here reads or writes files.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from models.config import ModelConfig, SpikingConfig
from models.initialisation import tensor_for
from models.model import Model
from models.sequence import SequenceContext
from parallel.boxes import Box, box_of
from parallel.config import Precision, Shard
from parallel.engine_protocol import Engine, Microbatch, ParamGroup, UpdateRule
from parallel.fully_sharded import begin_microbatch, master_dtype, release, shard_model
from parallel.gradients import NonFiniteError, clip, global_norm
from parallel.local_optimizer import LocalOptimizer
from parallel.mesh import Mesh

if TYPE_CHECKING:
    from models.kernels import KernelSet
    from models.spiking.neurons import Spikes

__all__ = ["Engine", "Microbatch", "NonFiniteError", "ParamGroup", "TorchEngine", "UpdateRule"]


class TorchEngine:
    """FSDP2 over the data-parallel ranks of `mesh`, also when there is one.

    Args:
        config: the model.
        spiking: neuron at the inputs of projections.
        mesh: this process's place.
        precision: compute dtype; parameters at rest are float32 (float64 for fp64).
        shard: what ranks share out.
        groups: trained parameters; all others are frozen and have no optimizer state.
        rule: update rule and clip norm.
        kernels: attention kernels.
        recompute: blocks whose activations are computed again in the backward pass.
        seed: draws every parameter; None leaves NaN for a checkpoint to fill.
        loss_chunk_tokens: tokens whose logits exist at a time.
    """

    def __init__(  # noqa: PLR0913 - the composition root of an engine
        self,
        config: ModelConfig,
        *,
        mesh: Mesh,
        groups: Sequence[ParamGroup],
        rule: UpdateRule,
        spiking: SpikingConfig | None = None,
        precision: Precision = Precision.fp32,
        shard: Shard = Shard.gradients,
        kernels: KernelSet | None = None,
        recompute: Collection[int] = frozenset(),
        seed: int | None = None,
        loss_chunk_tokens: int = 1024,
    ) -> None:
        self.mesh, self.shard = mesh, shard
        self._clip_norm = rule.clip_norm
        with torch.device("meta"):
            model = Model(
                config,
                spiking=spiking,
                kernels=kernels,
                recompute=recompute,
                loss_chunk_tokens=loss_chunk_tokens,
            )
        assert not list(model.buffers()), "a buffer would be lost on the meta device"
        self.model = model.to(master_dtype(precision))
        _freeze(self.model, groups)
        shard_model(self.model, mesh, precision=precision, shard=shard)
        self._materialise(seed)
        self._optimizer = LocalOptimizer(dict(self.model.named_parameters()), groups, rule)

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
            ValueError: ranks that disagree on either number, on every rank alike.
            NonFiniteError: on every rank alike; gradients are dropped, nothing else has changed.
        """
        self._check_agreement(len(microbatches), num_targets)
        self._drop_gradients()
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for index, microbatch in enumerate(microbatches):
            begin_microbatch(self.model, shard=self.shard, is_last=index == len(microbatches) - 1)
            tokens, labels, sequence = self._place(microbatch)
            loss_sum = self.model(tokens, sequence, labels=labels, spikes=spikes)
            (loss_sum / num_targets).backward()
            total += loss_sum.detach()
        losses = [row[0] for row in self.mesh.gather_numbers((float(total),))]
        for rank, loss in enumerate(losses):
            if not math.isfinite(loss):
                self._drop_gradients()
                raise NonFiniteError("loss", loss, rank=rank, parameter=None)
        return sum(losses) / num_targets

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
        gradients = self._gradients()
        try:
            norm = global_norm(gradients, self.mesh)
            present = {name: value for name, value in gradients.items() if value is not None}
            clip(list(present.values()), norm, self._clip_norm)
            self._optimizer.update(present, lr)
        finally:
            self._drop_gradients()
        return norm

    def token_losses(self, batch: Microbatch, *, spikes: Spikes | None = None) -> Tensor:
        """Loss of each token `[rows, T]` of this rank's rows, 0 where masked, on the CPU."""
        tokens, labels, sequence = self._place(batch)
        with torch.no_grad():
            losses: Tensor = self.model.token_losses(tokens, sequence, labels, spikes=spikes)
        release(self.model)
        return losses.cpu()

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Sum of small CPU tensors over ranks, in rank order: the same bits on every rank."""
        if self.mesh.size == 1:
            return values.clone()
        parts = [torch.empty_like(values) for _ in range(self.mesh.size)]
        dist.all_gather(parts, values.contiguous(), group=self.mesh.group)
        return torch.stack(parts).sum(dim=0)

    @property
    def parameters(self) -> dict[str, Box]:
        """This rank's part of every parameter, in memory shared with the model."""
        return {name: box_of(parameter) for name, parameter in self.model.named_parameters()}

    def optimizer_state(self) -> dict[str, Box]:
        """This rank's part of the optimizer state as `<state>/<parameter>`, shared likewise."""
        return self._optimizer.state()

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
            name: box_of(parameter).like(gradient)
            for name, parameter in self.model.named_parameters()
            if (gradient := _local(parameter.grad)) is not None
        }

    def _materialise(self, seed: int | None) -> None:
        """Give every parameter memory and either its drawn values or NaN."""
        self.model.to_empty(device=self.mesh.device)
        layouts = self.model.layouts()
        for name, parameter in self.model.named_parameters():
            box = box_of(parameter)
            if seed is None:
                box.local.fill_(math.nan)
            else:
                box.fill(tensor_for(name, layouts[name], self.model.config, seed))

    def _place(self, batch: Microbatch) -> tuple[Tensor, Tensor, SequenceContext]:
        """Move a batch to the device; boundaries are counted on the CPU first."""
        device = self.mesh.device
        sequence = SequenceContext.from_document_ids(batch.document_ids)
        placed = replace(
            sequence,
            positions=sequence.positions.to(device, non_blocking=True),
            document_ids=sequence.document_ids.to(device, non_blocking=True),
            cu_seqlens=sequence.cu_seqlens.to(device, non_blocking=True),
        )
        return batch.tokens.to(device), batch.labels.to(device), placed

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

    def _gradients(self) -> Mapping[str, Tensor | None]:
        parameters = dict(self.model.named_parameters())
        return {name: _local(parameters[name].grad) for name in self._optimizer.names}

    def _drop_gradients(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None


def _freeze(model: nn.Module, groups: Sequence[ParamGroup]) -> None:
    trained = {name for group in groups for name in group.names}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def _local(gradient: Tensor | None) -> Tensor | None:
    """This rank's shard of a gradient, sharing its memory."""
    if isinstance(gradient, DTensor):
        local: Tensor = gradient.to_local()
        return local
    return gradient
