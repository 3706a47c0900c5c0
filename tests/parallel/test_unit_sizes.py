"""Sizes of units at real size, where no engine can be built to compare with."""

from __future__ import annotations

from itertools import product

import pytest

from models.cost import parameter_count
from parallel.config import ParallelConfig, Precision
from parallel.pipeline_cut import cut
from parallel.unit_sizes import Shares, partial_elements, stage_units, vocabulary_rows
from tests.models.test_cost import SPIKINGBRAIN_7B
from tests.models.tiny import tiny_config


@pytest.mark.parametrize(("pp", "tp"), list(product([1, 4], [1, 2])))
def test_ranks_of_the_7b_hold_all_of_it_once(pp: int, tp: int) -> None:
    shares = Shares(tp=tp, dp_shard=64, vocab_multiple=128)
    stages = cut(SPIKINGBRAIN_7B, ParallelConfig(pp=pp), sequence_length=8192)
    units = [
        unit
        for stage in stages
        for unit in stage_units(SPIKINGBRAIN_7B, stage, shares, precision=Precision.bf16)
    ]
    # Each tp rank has whole norms, gates' first halves and output biases; the vocabulary of
    # 152,064 rows is a multiple of 128 already.
    layers = SPIKINGBRAIN_7B.num_hidden_layers
    replicated = (2 * layers + 1) * 3584 + layers // 2 * (128 + 16 * 3584)
    total = sum(unit.all.whole for unit in units)
    assert total * tp == parameter_count(SPIKINGBRAIN_7B) + (tp - 1) * replicated
    assert len({unit.layer for unit in units}) == layers + 1
    # Norms and gates lie in float32 units.
    float32 = sum(unit.all.whole for unit in units if unit.is_float32)
    gates = layers // 2 * (16 * 512 // tp + 512 // tp)
    assert float32 == replicated + gates


def test_the_last_shards_own_less_and_hold_as_much() -> None:
    config = tiny_config(mixers="F", ffns="d")
    (stage,) = cut(config, ParallelConfig(), sequence_length=8)

    def of(shard_rank: int) -> tuple[int, int]:
        shares = Shares(tp=1, dp_shard=4, vocab_multiple=128, shard_rank=shard_rank)
        units = stage_units(config, stage, shares, precision=Precision.fp32)
        return sum(u.all.shard for u in units), sum(u.all.own for u in units)

    holds, owns = zip(*(of(rank) for rank in range(4)), strict=True)
    assert len(set(holds)) == 1
    # 61 rows of the vocabulary are 16, 16, 16 and 13.
    assert owns[0] - owns[3] == 2 * 3 * 24
    assert sum(owns) == parameter_count(config)


def test_frozen_parameters_are_held_but_not_trained() -> None:
    config = tiny_config(mixers="F", ffns="d")
    (stage,) = cut(config, ParallelConfig(), sequence_length=8)
    shares = Shares(tp=1, dp_shard=1, vocab_multiple=128)
    units = stage_units(
        config, stage, shares, precision=Precision.fp32, frozen={"embedding.weight"}
    )
    root = next(unit for unit in units if unit.layer is None)
    assert root.all.whole - root.trained.whole == 61 * 24
    assert root.trained.largest == 61 * 24  # the head


def test_a_cut_vocabulary_is_padded() -> None:
    config = tiny_config()
    assert vocabulary_rows(config, Shares(tp=1, dp_shard=1, vocab_multiple=128)) == 61
    assert vocabulary_rows(config, Shares(tp=2, dp_shard=1, vocab_multiple=128)) == 64
    assert vocabulary_rows(config, Shares(tp=2, dp_shard=1, vocab_multiple=8)) == 32


def test_partial_gradients_are_those_of_the_table() -> None:
    config = tiny_config(mixers="L F", ffns="d d", qk_norm=True, output_bias=True)
    (stage,) = cut(config, ParallelConfig(), sequence_length=8)
    shares = Shares(tp=2, dp_shard=1, vocab_multiple=128)
    # q and k norms of two layers, the gate's first half and the head norm of one.
    heads = 2 * 2 * 8 + 16 * 24 + 8
    assert partial_elements(config, stage, shares, sequence_parallel=False) == heads
    # With sequence parallelism also five norms of the stream and two output biases.
    stream = 5 * 24 + 2 * 24
    assert partial_elements(config, stage, shares, sequence_parallel=True) == heads + stream
