"""How much of each parameter one rank holds: the arithmetic of tensor parallelism and FSDP2.

Tensor parallelism cuts the dim that `ParamLayout` names and pads the vocabulary; FSDP2 then cuts
rows into equal pieces of `ceil(rows / dp_shard)`, so that the last ranks hold fewer and padding.
Builds no module.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from models.config import ModelConfig
from models.layers import ParamLayout
from models.layouts import parameter_layouts
from parallel.config import Precision
from parallel.fully_sharded import FLOAT32_MODULES
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

    `is_float32` marks the unit of what computes in float32 while the rest is bfloat16.
    """

    layer: int | None
    is_float32: bool
    all: Sizes
    trained: Sizes


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """What parameters are cut over, and which shard is looked at (the first holds the most)."""

    tp: int
    dp_shard: int
    vocab_multiple: int
    shard_rank: int = 0


def stage_units(
    config: ModelConfig,
    stage: StageCut,
    shares: Shares,
    *,
    precision: Precision,
    frozen: Collection[str] = frozenset(),
) -> list[Unit]:
    """The FSDP units of one stage."""
    shapes: dict[tuple[int | None, bool], dict[str, tuple[int, int]]] = {}
    for name, layout in stage_parameters(config, stage).items():
        place = (layer_of(name), acts_in_float32(name, precision))
        shapes.setdefault(place, {})[name] = _local_shape(config, name, layout, shares)
    units = []
    for (layer, is_float32), members in shapes.items():
        trained = [shape for name, shape in members.items() if _name_in(config, name) not in frozen]
        of_all = _sizes(members.values(), shares)
        units.append(Unit(layer, is_float32, of_all, _sizes(trained, shares)))
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
        if name in layouts and name not in frozen and "tp" in layouts[name].partial_axes
    ]
    return _sizes(shapes, shares).own


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
    """Rows and row length of a tensor-parallel share."""
    if name in VOCABULARY:
        return vocabulary_rows(config, shares), config.hidden_size
    shape = list(layout.global_shape)
    if layout.tp_dim is not None:
        shape[layout.tp_dim] //= shares.tp
    return shape[0], math.prod(shape[1:])
