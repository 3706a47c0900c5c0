"""FSDP2 over the data-parallel ranks: units, dtypes and when they gather, reduce and reshard.

Order is the knowledge here: float32 units and experts first, then blocks, then the root. Gradients
are sums over ranks (of a loss already divided by the global number of targets), never averages.
With one rank the same code runs without communication.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import Shard as CutAlong

from models.model import Model
from parallel.config import Precision, Shard
from parallel.mesh import Mesh

FLOAT32_MODULES = frozenset(
    {
        "mixer_norm", "ffn_norm", "final_norm", "q_norm", "k_norm", "head_norm", "output_norm",
        "gate_down", "gate_up", "merge", "router",
    }
)  # fmt: skip
"""Modules whose parameters act in float32 while the rest computes in bfloat16.

FSDP2 would hand them bfloat16 weights inside forward (measured), so each block's lie in a unit of
their own, which is small and stays gathered until the backward pass. Their inputs are not cast:
norms return their input's dtype; gate, router and the weights of branches widen their inputs.
"""
EXPERT_MODULE = "experts"
"""Module whose parameters are cut over the expert-parallel axis where there is one."""


def master_dtype(precision: Precision) -> torch.dtype:
    """Dtype of parameters, gradients and optimizer state at rest."""
    return torch.float64 if precision is Precision.fp64 else torch.float32


def compute_dtype(precision: Precision) -> torch.dtype:
    """Dtype of the residual stream."""
    return torch.bfloat16 if precision is Precision.bf16 else master_dtype(precision)


def shard_model(
    model: Model, mesh: Mesh, *, precision: Precision, shard: Shard, offload: bool = False
) -> None:
    """Turn a model (on the meta device, or on the mesh's) into FSDP units in place.

    After it, parameters are DTensors that hold this rank's rows (of its tensor-parallel share);
    on the meta device they are still to be materialised. With `offload` they rest on the host.
    """
    options: dict[str, Any] = {
        "mesh": mesh.fsdp_mesh,
        "reshard_after_forward": shard is Shard.parameters or offload,
        "shard_placement_fn": _cut_over(mesh.fsdp_mesh),
    }
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device.type != "cpu")
    # A norm may run again before a gradient has reached its unit: these few stay gathered.
    kept = {**options, "reshard_after_forward": False}
    float32, rest = _policies(precision)
    apart: set[object] = set()
    for block in model.blocks:
        if precision is Precision.bf16:
            modules = [*_modules_named(block, FLOAT32_MODULES)]
            fully_shard(modules, mp_policy=float32, **kept)
        if mesh.ep_size > 1:
            apart |= _shard_experts(block, mesh, rest, options)
        fully_shard(block, mp_policy=rest, **options)
    if precision is Precision.bf16 and model.final_norm is not None:
        fully_shard(model.final_norm, mp_policy=float32, **kept)
    # The root's parameters are needed by the first step of the backward pass: keep them gathered.
    fully_shard(model, mp_policy=rest, **kept)
    for unit in units(model):
        # With one rank the sum is the mean, and a factor makes FSDP2 divide every gradient into
        # another buffer.
        if mesh.dp_size > (mesh.ep_size if unit in apart else 1):
            unit.set_gradient_divide_factor(1.0)
        # Without it gloo is asked for a reduction that it does not have (float32 and bfloat16).
        unit.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "token_losses")


def shard_dim(shape: Sequence[int], num_shards: int) -> int:
    """The dim of a parameter that FSDP cuts: rows, which it pads to equal pieces.

    Stacked matrices `[E, ., .]` of which the ranks get no equal number are cut along their next
    dim where that is even: rows of 2 experts, padded for 16 ranks, would take 8 times their size.
    """
    is_stack = len(shape) == 3
    return int(is_stack and shape[0] % num_shards > 0 and shape[1] % num_shards == 0)


def units(model: nn.Module) -> Iterator[FSDPModule]:
    """Every module that is an FSDP unit or a part of one."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            yield module


def begin_microbatch(model: nn.Module, *, shard: Shard, is_last: bool) -> None:
    """Say whether the coming backward pass ends a step.

    Before the last microbatch gradients stay where they are and parameters stay gathered; with
    sharded parameters both are given up after every microbatch, which is what that level is for.
    """
    assert isinstance(model, FSDPModule)
    finish = is_last or shard is Shard.parameters
    model.set_requires_gradient_sync(finish)
    model.set_reshard_after_backward(finish)


def release(model: nn.Module) -> None:
    """Give up gathered parameters, so that the next pass sees whatever is written into shards."""
    for unit in units(model):
        unit.reshard()


def _policies(precision: Precision) -> tuple[MixedPrecisionPolicy, MixedPrecisionPolicy]:
    """Policies of the float32 units and of all others."""
    if precision is not Precision.bf16:
        return MixedPrecisionPolicy(), MixedPrecisionPolicy()
    float32 = MixedPrecisionPolicy(
        param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    return float32, MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def _shard_experts(
    block: nn.Module, mesh: Mesh, policy: MixedPrecisionPolicy, options: dict[str, Any]
) -> set[nn.Module]:
    """Make units of a block's experts over the ranks that hold the same ones; returns them."""
    own = mesh.expert_fsdp_mesh
    options = {**options, "mesh": own, "shard_placement_fn": _cut_over(own)}
    found = set(_modules_named(block, {EXPERT_MODULE}))
    for experts in found:
        fully_shard(experts, mp_policy=policy, **options)
    return found


def _cut_over(mesh: DeviceMesh) -> Callable[[nn.Parameter], CutAlong | None]:
    """FSDP2's question of where to cut each parameter, over the last axis of its mesh."""
    num_shards = mesh.size(mesh.ndim - 1)
    return lambda parameter: CutAlong(shard_dim(parameter.shape, num_shards))


def _modules_named(block: nn.Module, names: Collection[str]) -> Iterator[nn.Module]:
    for name, module in block.named_modules():
        if name.rpartition(".")[2] in names:
            yield module
