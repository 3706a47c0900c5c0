"""What a mixer is made of: one branch, or two parallel ones (`X+Y`) and their weights in the sum.

SpikingBrain report, section 2.2 and equation 6: branches are normalised, weighted and added. In
which order that happens is `models.mixer`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn

from models.layer_pattern import MixerKind, Mixers
from models.layers import Parts
from models.linear_attention import GatedLinearAttention
from models.mixer_config import BranchMerge, BranchNorm, BranchProjections
from models.mixer_core import MixerCore
from models.norm import RMSNorm
from models.projections import HeadProjections
from models.softmax_attention import SoftmaxAttention

Norm = Callable[[Tensor], Tensor]
Norms = tuple[Norm | None, ...]
"""One a branch, where it has one."""
Places = tuple[int, ...]
"""Which branches of the mixer, by index: all for tokens, for sinks those that they run through."""
Weigh = Callable[[tuple[Tensor, ...], Places], tuple[Tensor, ...]]
"""`BranchWeights`."""


@dataclass(frozen=True, slots=True)
class Branch:
    """A core between projections, which branches may share. Their submodules are the mixer's."""

    kind: MixerKind
    projections: HeadProjections
    core: MixerCore
    output_norm: RMSNorm | None = None


class BranchWeights(nn.Module):
    """Weighs normalised branches: by 1 each, 1 over their number, or learned weights.

    Learned ones act in at least float32. They hold NaN until initialised or loaded.
    """

    def __init__(self, merge: BranchMerge, num_branches: int) -> None:
        super().__init__()
        self.factor = 1 / num_branches if merge is BranchMerge.mean else 1.0
        self.weight: nn.Parameter | None = None
        if merge is BranchMerge.learned:
            self.weight = nn.Parameter(torch.full((num_branches,), float("nan")))

    def forward(self, branches: tuple[Tensor, ...], places: Places) -> tuple[Tensor, ...]:
        """Weigh outputs of one shape, of the branches at `places`.

        Returns at least float32 where weights are learned.
        """
        if self.weight is None:
            return branches if self.factor == 1.0 else tuple(x * self.factor for x in branches)
        dtype = torch.promote_types(branches[0].dtype, torch.float32)
        weights = self.weight.to(dtype).unbind()
        return tuple(weights[i] * x.to(dtype) for i, x in zip(places, branches, strict=True))


def build_branches(
    owner: nn.Module, parts: Parts, mixers: Mixers, layer: int
) -> tuple[Branch, ...]:
    """The branches of one layer, their submodules registered in the mixer `owner`.

    A single branch and shared projections are named after the mixer, all else of parallel branches
    after a submodule of their kind: `linear.head_norm`.
    """
    return tuple(_branches(owner, parts, mixers, layer))


def _branches(owner: nn.Module, parts: Parts, mixers: Mixers, layer: int) -> Iterator[Branch]:
    config = parts.config.branches
    is_parallel = len(mixers) > 1
    shared: HeadProjections | None = None
    if not is_parallel or config.projections is BranchProjections.shared:
        shared = HeadProjections(parts)
        _adopt(owner, shared)
    for kind in mixers:
        home = owner
        if is_parallel:
            home = nn.Module()
            owner.add_module(kind.name, home)
        projections = shared
        if projections is None:
            projections = HeadProjections(parts)
            _adopt(home, projections)
        has_head_norm = is_parallel and config.norm is BranchNorm.before_output
        core = _core(parts, kind, layer, has_head_norm=has_head_norm)
        _adopt(home, core)
        output_norm = None
        if is_parallel and config.norm is BranchNorm.after_output:
            output_norm = RMSNorm(parts.config.hidden_size, parts.config.rms_norm_eps)
            home.add_module("output_norm", output_norm)
        yield Branch(kind, projections, core, output_norm)


def _core(parts: Parts, kind: MixerKind, layer: int, *, has_head_norm: bool) -> MixerCore:
    if kind is MixerKind.linear:
        return GatedLinearAttention(parts, layer=layer)
    return SoftmaxAttention(parts, kind=kind, has_head_norm=has_head_norm)


def _adopt(owner: nn.Module, part: nn.Module) -> None:
    """Make the submodules of `part` those of `owner`, so that parameters are named after it."""
    for name, child in part.named_children():
        owner.add_module(name, child)


def normed_and_weighed(
    outputs: tuple[Tensor, ...], norms: Norms, weigh: Weigh | None, places: Places
) -> tuple[Tensor, ...]:
    """The outputs of the branches at `places` through their norms, if any, and then their weights.

    `norms` are those of these branches.
    """
    pairs = zip(outputs, norms, strict=True)
    normed = tuple(x if norm is None else norm(x) for x, norm in pairs)
    return normed if weigh is None else weigh(normed, places)


def add(outputs: tuple[Tensor, ...]) -> Tensor:
    """The sum over branches; of one it is that."""
    return reduce(torch.add, outputs)
