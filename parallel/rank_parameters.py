"""This rank's parameters: which ones it holds, where they lie, whose gradient is complete.

Reads `ParamLayout`, the one table of what is cut, partial and tied, for boxes, gradient sums and
the norm. Knows neither FSDP's nor a pipeline's order of work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.layers import ParamLayout
from models.model import Model
from parallel.boxes import Box, Region, local_of, region_of
from parallel.gradients import Shares
from parallel.mesh import Mesh

EMBEDDING, HEAD = "embedding.weight", "head.weight"


@dataclass(frozen=True, slots=True)
class RankParameters:
    """Parameters of this rank's parts of the model, by global name.

    `layouts` is the table of the whole model. A head that is tied to the embedding of another
    pipeline stage holds a copy of it under the same name (`has_tied_copy`): its gradient is summed
    with the embedding's, and both are updated alike.
    """

    mesh: Mesh
    layouts: Mapping[str, ParamLayout]
    parameters: Mapping[str, nn.Parameter]
    has_tied_copy: bool
    is_tied_apart: bool

    @classmethod
    def of(
        cls, parts: Sequence[Model], layouts: Mapping[str, ParamLayout], mesh: Mesh
    ) -> RankParameters:
        """Collect the parameters of all parts that this rank holds."""
        is_tied_apart = parts[0].config.tie_word_embeddings and mesh.pp_size > 1
        has_head = any(part.part.has_head for part in parts)
        parameters = {name: value for part in parts for name, value in global_names(part)}
        unknown = parameters.keys() - layouts.keys()
        assert not unknown, f"parameters without a layout: {sorted(unknown)}"
        return cls(mesh, layouts, parameters, is_tied_apart and has_head, is_tied_apart)

    def __iter__(self) -> Iterator[str]:
        return iter(self.parameters)

    def region(self, name: str) -> Region:
        """Where this rank's values of a parameter, its gradient and its moments lie."""
        return region_of(
            self.parameters[name],
            self.layouts[name],
            tp_rank=self.mesh.tp_rank,
            ep_rank=self.mesh.ep_rank,
        )

    def box(self, name: str, values: Tensor | None = None) -> Box:
        """This rank's part of a parameter, or of other values in its place."""
        local = local_of(self.parameters[name]) if values is None else values
        return self.region(name).box(local)

    def gradients(self) -> dict[str, Tensor | None]:
        """This rank's part of each trained parameter's gradient, sharing its memory."""
        return {
            name: None if parameter.grad is None else local_of(parameter.grad)
            for name, parameter in self.parameters.items()
            if parameter.requires_grad
        }

    def drop_gradients(self) -> None:
        """Forget all gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def complete_gradients(self) -> None:
        """Add what other ranks contributed to gradients that are partial here. Collective.

        Every gradient must be there.
        """
        gradients = {name: value for name, value in self.gradients().items() if value is not None}
        partial = [g for name, g in gradients.items() if "tp" in self.layouts[name].partial_axes]
        if self.mesh.tp_size > 1 and partial:
            _all_reduce(partial, self.mesh.tp_group)
        if self.is_tied_apart and EMBEDDING in gradients:
            self._add_tied(gradients[EMBEDDING])

    def shares(self) -> Shares:
        """Which gradients this rank counts in the global norm, and every parameter's number."""
        counted = {name for name in self.parameters if self._is_counted(name)}
        return Shares(tuple(self.layouts), frozenset(counted))

    def _is_counted(self, name: str) -> bool:
        layout, mesh = self.layouts[name], self.mesh
        copy = mesh.replicate_rank if layout.ep_dim is None else mesh.expert_replicate_rank
        if copy > 0 or (name == EMBEDDING and self.has_tied_copy):
            return False
        return mesh.tp_rank == 0 or layout.tp_dim is not None

    def _add_tied(self, gradient: Tensor) -> None:
        """Exchange the gradients of the embedding and of the head that is tied to it."""
        if gradient.numel() == 0:
            return
        place = self.mesh.place_of(self.mesh.rank)
        other = 0 if self.has_tied_copy else self.mesh.pp_size - 1
        peer = int(self.mesh.device_mesh.mesh[other, place.dp_replicate, place.dp_shard, place.tp])
        received, group = torch.empty_like(gradient), self.mesh.pp_group
        for work in dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, gradient, peer, group=group),
                dist.P2POp(dist.irecv, received, peer, group=group),
            ]
        ):
            work.wait()
        gradient.add_(received)


def global_names(part: Model) -> Iterator[tuple[str, nn.Parameter]]:
    """A part's parameters by their names in the whole model, where a tied head has none."""
    for name, parameter in part.named_parameters():
        is_copy = name == HEAD and part.config.tie_word_embeddings
        yield EMBEDDING if is_copy else name, parameter


def _all_reduce(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Sum small tensors over ranks in place, in one message."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat, group=group)
    sizes = [tensor.numel() for tensor in tensors]
    for tensor, values in zip(tensors, torch.split(flat, sizes), strict=True):
        tensor.copy_(values.view_as(tensor))
