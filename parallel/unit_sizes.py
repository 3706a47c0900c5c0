"""How much of each parameter one rank holds: the arithmetic of tensor parallelism, ep and FSDP2.

Tensor and expert parallelism cut the dims that `ParamLayout` names, the first pads the vocabulary;
FSDP2 then cuts rows (or what `shard_dim` says) into equal pieces of `ceil(rows / dp_shard)`, so
that the last ranks hold fewer and padding. Builds no module.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from models.config import ModelConfig
from models.layers import ParamLayout
from models.layouts import parameter_layouts
from parallel.config import Precision
from parallel.fully_sharded import FLOAT32_MODULES, shard_dim
from parallel.pipeline_cut import StageCut
from parallel.vocabulary import padded_vocab_size

VOCABULARY = frozenset({"embedding.weight", "head.weight"})


@dataclass(frozen=True, slots=True)
class Sizes:
    """Elements of some parameters: whole, rows padded, a rank's padded shard, what it truly owns.

    `largest` is the most that the rank owns of one of them, `count` how many it owns anything of.
    """

    whole: int
    padded: int
    shard: int
    own: int
    largest: int
    count: int


@dataclass(frozen=True, slots=True)
class Unit:
    """One FSDP unit: of a layer, or of the root (`layer` None). Its trained part is a part of all.

    `is_float32` marks the unit of what computes in float32 while the rest is bfloat16, `is_expert`
    that of experts which are cut over ep. Each of `num_copies` lies in `num_shards` pieces.
    """

    layer: int | None
    is_float32: bool
    is_expert: bool
    num_shards: int
    num_copies: int
    all: Sizes
    trained: Sizes


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """What parameters are cut over, and which shard is looked at (the first holds the most)."""

    tp: int
    dp_shard: int
    vocab_multiple: int
    shard_rank: int = 0
    dp_replicate: int = 1
    ep: int = 1

    def of_experts(self) -> Shares:
        """What a rank's experts are cut over; see `parallel.axes.expert_axis_sizes`."""
        if self.dp_shard % self.ep == 0:
            shards, rank = self.dp_shard // self.ep, self.shard_rank // self.ep
            return replace(self, dp_shard=shards, shard_rank=rank)
        copies = self.dp_replicate * self.dp_shard // self.ep
        return replace(self, dp_shard=1, shard_rank=0, dp_replicate=copies)


def stage_units(
    config: ModelConfig,
    stage: StageCut,
    shares: Shares,
    *,
    precision: Precision,
    frozen: Collection[str] = frozenset(),
) -> list[Unit]:
    """The FSDP units of one stage."""
    shapes: dict[tuple[int | None, bool, bool], dict[str, tuple[int, int]]] = {}
    untrained = set(frozen)
    for name, layout in stage_parameters(config, stage).items():
        is_expert = layout.ep_dim is not None and shares.ep > 1
        place = (layer_of(name), acts_in_float32(name, precision), is_expert)
        shapes.setdefault(place, {})[name] = _local_shape(config, name, layout, shares)
        untrained |= {name} if layout.is_state else set()
    units = []
    for place, members in shapes.items():
        own = shares.of_experts() if place[2] else shares
        trained = [
            size for name, size in members.items() if _name_in(config, name) not in untrained
        ]
        sizes = _sizes(members.values(), own), _sizes(trained, own)
        units.append(Unit(*place, own.dp_shard, own.dp_replicate, *sizes))
    return units


def stage_parameters(config: ModelConfig, stage: StageCut) -> dict[str, ParamLayout]:
    """Parameters that a stage holds; a head that is tied to another stage's embedding is a copy."""
    layouts = parameter_layouts(config)
    found = {
        name: layout
        for name, layout in layouts.items()
        if (layer := layer_of(name)) is not None and stage.first_layer <= layer < stage.end_layer
    }
    if stage.has_embedding:
        found["embedding.weight"] = layouts["embedding.weight"]
    if stage.has_head:
        found["final_norm.weight"] = layouts["final_norm.weight"]
        if not (config.tie_word_embeddings and stage.has_embedding):
            found["head.weight"] = layouts["embedding.weight"]
    return found


def partial_elements(
    config: ModelConfig,
    stage: StageCut,
    shares: Shares,
    *,
    sequence_parallel: bool,
    frozen: Collection[str] = frozenset(),
) -> int:
    """Elements that a rank owns of gradients which tensor-parallel ranks must add up."""
    layouts = parameter_layouts(config, sequence_parallel=sequence_parallel)
    shapes = [
        _local_shape(config, name, layouts[name], shares)
        for name in stage_parameters(config, stage)
        if name in layouts and name not in frozen and _is_partial(layouts[name])
    ]
    return _sizes(shapes, shares).own


def _is_partial(layout: ParamLayout) -> bool:
    return "tp" in layout.partial_axes and not layout.is_state


def _name_in(config: ModelConfig, name: str) -> str:
    """The name of a stage's parameter in the whole model, where a tied head has none."""
    is_copy = name == "head.weight" and config.tie_word_embeddings
    return "embedding.weight" if is_copy else name


def layer_of(name: str) -> int | None:
    """The layer that a parameter belongs to."""
    return int(name.split(".")[1]) if name.startswith("blocks.") else None


def acts_in_float32(name: str, precision: Precision) -> bool:
    """Whether a parameter is in a float32 unit while the rest computes in bfloat16."""
    return precision is Precision.bf16 and name.split(".")[-2] in FLOAT32_MODULES


def vocabulary_rows(config: ModelConfig, shares: Shares) -> int:
    """Rows of the embedding and of the head on one rank, padding included."""
    if shares.tp == 1:
        return config.vocab_size
    return padded_vocab_size(config.vocab_size, shares.tp, shares.vocab_multiple) // shares.tp


def own_rows(rows: int, shares: Shares) -> int:
    """Rows of a parameter that this shard truly holds."""
    each = -(-rows // shares.dp_shard)
    return max(0, min(each, rows - shares.shard_rank * each))


def _sizes(shapes: Iterable[tuple[int, int]], shares: Shares) -> Sizes:
    whole = padded = shard = own = largest = count = 0
    for rows, width in shapes:
        each = -(-rows // shares.dp_shard)
        mine = own_rows(rows, shares) * width
        whole += rows * width
        padded += each * shares.dp_shard * width
        shard += each * width
        own += mine
        largest = max(largest, mine)
        count += mine > 0
    return Sizes(whole, padded, shard, own, largest, count)


def _local_shape(
    config: ModelConfig, name: str, layout: ParamLayout, shares: Shares
) -> tuple[int, int]:
    """What FSDP cuts of a rank's share, and how much lies at each place along it."""
    if name in VOCABULARY:
        return vocabulary_rows(config, shares), config.hidden_size
    shape = list(layout.global_shape)
    for dim, size in ((layout.tp_dim, shares.tp), (layout.ep_dim, shares.ep)):
        if dim is not None:
            shape[dim] //= size
    own = shares if layout.ep_dim is None else shares.of_experts()
    rows = shape[shard_dim(shape, own.dp_shard)]
    return rows, math.prod(shape) // rows
