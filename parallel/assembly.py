"""How a rank's share of a model comes to be: layers, dtype, sharding, memory, in this order.

The order is the knowledge: layers are cut for tensor parallelism while they are built on the meta
device, master dtype and frozen parameters are set before FSDP groups them, and memory comes last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch.distributed.fsdp import register_fsdp_forward_method

from models.config import ModelConfig, SpikingConfig
from models.initialisation import tensor_for
from models.layers import LayerProvider, LocalLayers
from models.layouts import parameter_layouts
from models.model import Model
from models.part import ModelPart
from models.recomputation import NOTHING, Recomputation
from parallel.boxes import local_of
from parallel.config import ParallelConfig, PipelineSchedule, Precision, Shard
from parallel.engine_protocol import ParamGroup
from parallel.experts import ExpertParallelLayers, check_expert_parallel
from parallel.fully_sharded import master_dtype, shard_model
from parallel.mesh import Mesh
from parallel.pipeline_cut import StageCut
from parallel.rank_parameters import RankParameters, global_names
from parallel.teacher import Teacher, TeacherPart, TeacherSpec, check_teacher
from parallel.tensor_parallel import TensorParallelLayers, check_sinks, check_tensor_parallel

if TYPE_CHECKING:
    from models.kernels import KernelSet


@dataclass(frozen=True, kw_only=True, slots=True)
class Blueprint:
    """What every part of one model is built from; see `parallel.engine.TorchEngine`.

    With `offload` parameters rest on the host.
    """

    config: ModelConfig
    spiking: SpikingConfig | None
    precision: Precision
    kernels: KernelSet | None
    recompute: Recomputation
    loss_chunk_tokens: int
    offload: bool = False


def own_parts(config: ModelConfig, stages: Sequence[StageCut], mesh: Mesh) -> list[ModelPart]:
    """The parts of this rank, in order; the whole model without a pipeline."""
    if mesh.pp_size == 1:
        return [ModelPart.whole(config)]
    return [stage.part for stage in stages if stage.pp_rank == mesh.pp_rank]


def build_parts(
    blueprint: Blueprint,
    parts: Sequence[ModelPart],
    groups: Sequence[ParamGroup],
    layout: ParallelConfig,
    mesh: Mesh,
    *,
    kind: type[Model] = Model,
) -> list[Model]:
    """This rank's parts, sharded, still on the meta device; parameters of no group are frozen."""
    trained = {name for group in groups for name in group.names}
    built = []
    for part in parts:
        with torch.device("meta"):
            model = kind(
                blueprint.config,
                spiking=blueprint.spiking,
                kernels=blueprint.kernels,
                layers=provider(mesh, layout),
                recompute=blueprint.recompute,
                part=part,
                loss_chunk_tokens=blueprint.loss_chunk_tokens,
            )
        assert not list(model.buffers()), "a buffer would be lost on the meta device"
        model.to(master_dtype(blueprint.precision))
        for name, parameter in global_names(model):
            parameter.requires_grad_(name in trained)
        shard_model(
            model,
            mesh,
            precision=blueprint.precision,
            shard=shard_level(layout, mesh),
            offload=blueprint.offload,
        )
        built.append(model)
    return built


def build_teacher(
    spec: TeacherSpec,
    student: Blueprint,
    parts: Sequence[ModelPart],
    layout: ParallelConfig,
    mesh: Mesh,
) -> Teacher:
    """A teacher cut, sharded and computed like the student's `parts`; its weights hold NaN.

    Raises:
        ValueError: a teacher that does not fit the student or the layout.
    """
    check_teacher(spec.config, student.config, spec.goals, pp=mesh.pp_size)
    check_tensor_parallel(spec.config, mesh.tp_size)
    check_expert_parallel(spec.config, mesh.ep_size)
    check_sinks(spec.config, layout)
    blueprint = replace(
        student, config=spec.config, spiking=None, recompute=NOTHING, offload=spec.offload
    )
    beside = own_parts(spec.config, (), mesh) if mesh.pp_size == 1 else parts
    models = build_parts(blueprint, beside, (), layout, mesh)
    for model in models:
        register_fsdp_forward_method(model, "streams")
    layouts = parameter_layouts(spec.config, sequence_parallel=layout.sequence_parallel)
    own = RankParameters.of(models, layouts, mesh)
    materialise(models, own, torch.device("cpu") if spec.offload else mesh.device, seed=None)
    share = provider(mesh, layout).whole_channels.share
    return Teacher(
        [TeacherPart(model, spec.goals, share) for model in models],
        {name: own.box(name) for name in own},
    )


def materialise(
    parts: Sequence[Model], own: RankParameters, device: torch.device, *, seed: int | None
) -> None:
    """Give every parameter memory and either its drawn values or NaN; padding is 0."""
    for part in parts:
        part.to_empty(device=device)
    for name, parameter in own.parameters.items():
        with torch.no_grad():
            local_of(parameter).zero_()
        box = own.box(name)
        if seed is None:
            box.local.fill_(math.nan)
        else:
            box.fill(tensor_for(name, own.layouts[name], parts[0].config, seed))


def provider(mesh: Mesh, layout: ParallelConfig) -> LayerProvider:
    """Cut layers where there is a tensor-parallel axis, plain ones otherwise; experts likewise."""
    ep_group = mesh.ep_group if mesh.ep_size > 1 else None
    if mesh.tp_size == 1:
        return LocalLayers() if ep_group is None else ExpertParallelLayers(ep_group)
    return TensorParallelLayers(
        mesh.tp_group,
        ep_group=ep_group,
        sequence_parallel=layout.sequence_parallel,
        vocab_multiple=layout.vocab_multiple,
    )


def shard_level(layout: ParallelConfig, mesh: Mesh) -> Shard:
    """The level asked for; zero_bubble keeps parameters gathered.

    Its split backward loses the gradients of resharded parameters without a word (torch 2.13,
    measured).
    """
    is_split = mesh.pp_size > 1 and layout.schedule is PipelineSchedule.zero_bubble
    if is_split and layout.shard is Shard.parameters:
        return Shard.gradients
    return layout.shard
