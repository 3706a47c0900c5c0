"""Bytes that blocks keep, planned, against what real blocks keep: exactly, whatever the module."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from models.activation_memory import block_footprint
from models.config import ModelConfig, NeuronKind, SpikingConfig, ThresholdGrad
from models.expert_config import Balance, ExpertConfig, RouterScore
from models.head_memory import embedding_footprint, head_footprint
from models.initialisation import initialise
from models.kernel_memory import Heads, softmax_memory
from models.memory_tape import Footprint
from models.mixer_config import (
    BranchConfig,
    BranchMerge,
    BranchNorm,
    BranchProjections,
    FeatureMap,
    GateKind,
    LinearAttentionConfig,
    SinkConfig,
    SinkRope,
)
from models.model import Model
from models.operation_memory import Again, Workload
from models.recomputation import Recomputation
from models.routing import Routing
from models.sequence import SequenceContext
from models.softmax_attention import SoftmaxAttention
from models.spiking.neurons import Spikes
from tests.support.allocations import peak_bytes
from tests.support.kept_bytes import kept_bytes

SIGMOID = LinearAttentionConfig(feature_map=FeatureMap.sigmoid, gate=GateKind.key_tied)
FLOOR = replace(SIGMOID, gate_offset=1.0, gate_floor=0.1)
SHAPES = [(1, 40), (2, 200), (3, 173)]
SPIKING = {
    "off": SpikingConfig(),
    "detached": SpikingConfig(neuron=NeuronKind.adaptive),
    "through": SpikingConfig(neuron=NeuronKind.adaptive, threshold_grad=ThresholdGrad.through),
}
MODELS: dict[str, dict[str, Any]] = {
    "F": {}, "S": {}, "L": {}, "_": {},
    "F qk_norm": {"qk_norm": True}, "L qk_norm": {"qk_norm": True},
    "F no groups": {"num_key_value_heads": 4}, "S no groups": {"num_key_value_heads": 4},
    "S long": {"window_tokens": 70, "qkv_bias": False},
    "L key-tied": {"linear": SIGMOID}, "L floor": {"linear": FLOOR},
    "L sigmoid": {"linear": LinearAttentionConfig(feature_map=FeatureMap.sigmoid)},
    "L+S": {}, "F+L": {"qk_norm": True}, "L+S key-tied": {"linear": FLOOR},
    **{f"L+F {'-'.join(each.name for each in (projections, norm, merge))}": {
        "branches": BranchConfig(projections=projections, norm=norm, merge=merge)
    } for projections, norm, merge in itertools.product(
        BranchProjections, BranchNorm, BranchMerge
    )},
}  # fmt: skip
MOE = ExpertConfig(num_experts=5, num_shared_experts=0, intermediate_size=28)
TOP_2 = replace(MOE, top_k=2, num_shared_experts=1)
EXPERTS: dict[str, ExpertConfig] = {
    "top 1": MOE,
    "top 2, shared": TOP_2,
    "capacity": replace(TOP_2, capacity_factor=1.25),
    "tight": replace(MOE, capacity_factor=0.5, num_shared_experts=2),
    "sigmoid": replace(TOP_2, score=RouterScore.sigmoid, renormalise=True, z_loss_coefficient=0.1),
    "step before": replace(TOP_2, balance=Balance.previous_step),
    "microbatch": replace(TOP_2, balance=Balance.microbatch, score=RouterScore.sigmoid),
    "bias": replace(TOP_2, balance=Balance.bias, num_experts=4),
    "no losses": replace(MOE, balance_coefficient=0.0),
}
MODELS |= {f"_ {name}": {"ffns": "e", "moe": moe} for name, moe in EXPERTS.items()}
SINKS = SinkConfig(num_tokens=36)
PAST = SinkConfig(num_tokens=5, through_linear=False)
ROPES = {each.name: replace(SINKS, rope=each) for each in SinkRope}
WITH_SINKS = {
    **{f"{name} {rope}": {"sinks": sinks} for name in "FS" for rope, sinks in ROPES.items()},
    "L sinks": {"sinks": SINKS},
    **{f"{mixer} past": {"sinks": PAST, "mixers": f"{mixer} F", "ffns": "d*2"} for mixer in "L_"},
    "L sinks key-tied": {"sinks": SINKS, "linear": FLOOR},
    "F sinks no groups": {"sinks": SINKS, "num_key_value_heads": 4, "qk_norm": True},
    "S sinks no groups": {"sinks": ROPES["none"], "num_key_value_heads": 4},
    "L+S sinks": {"sinks": SINKS}, "L+S past": {"sinks": PAST},
    **{f"{mixers} {'-'.join(each.name for each in (projections, norm, merge))}": {
        "sinks": sinks,
        "qk_norm": True,
        "branches": BranchConfig(projections=projections, norm=norm, merge=merge),
    } for mixers, sinks in (("F+L", SINKS), ("L+F", PAST))
    for projections, norm, merge in itertools.product(BranchProjections, BranchNorm, BranchMerge)
    if mixers == "F+L" or merge is BranchMerge.learned},
    **{f"F sinks, {name}": {"sinks": SINKS, "ffns": "e", "moe": EXPERTS[name]}
       for name in ("top 1", "capacity", "sigmoid")},
}  # fmt: skip
AGAIN = {
    "norms": Again(norms=True),
    "activations": Again(activations=True),
    "mixer": Again(mixer=True),
    "all parts": Again(norms=True, activations=True, mixer=True),
}
EXPERTS_AGAIN = AGAIN | {
    "experts": Again(experts=True),
    "norms and experts": Again(norms=True, experts=True),
    "parts and experts": Again(norms=True, activations=True, experts=True),
    "expert layer": Again(expert_layer=True),
    "all": Again(norms=True, activations=True, expert_layer=True),
}
LAYER = frozenset({0})


class Real:
    """One block and the planner's words for it."""

    def __init__(
        self,
        name: str,
        spiking: SpikingConfig,
        dtype: torch.dtype,
        again: Again | None = None,
        **sizes: int,
    ) -> None:
        again = again or Again()
        values: dict[str, Any] = {
            "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "qkv_bias": True,
            "window_tokens": 16, "mixers": name.partition(" ")[0], "ffns": "d",
        }  # fmt: skip
        known = WITH_SINKS | MODELS
        self.config = ModelConfig(**(values | known.get(name, {}) | sizes))
        self.again, self.spiking, self.dtype = again, spiking, dtype
        recompute = Recomputation(
            norms=LAYER if again.norms else frozenset(),
            activations=LAYER if again.activations else frozenset(),
            mixers=LAYER if again.mixer and name[0] != "_" else frozenset(),
            experts=LAYER if again.experts else frozenset(),
            expert_layers=LAYER if again.expert_layer else frozenset(),
        )
        self.model = Model(self.config, spiking=spiking, recompute=recompute)
        initialise(self.model, seed=1)
        for parameter_name, parameter in self.model.named_parameters():
            acts_wide = "norm" in parameter_name or "gate_up" in parameter_name
            acts_wide |= "gate_down" in parameter_name or "merge" in parameter_name
            acts_wide |= "router" in parameter_name
            wide = torch.promote_types(dtype, torch.float32)
            parameter.data = parameter.data.to(wide if acts_wide else dtype)

    def workload(self, rows: int, length: int) -> Workload:
        narrow = self.dtype.itemsize
        return Workload(
            model=self.config, spiking=self.spiking, rows=rows, length=length, narrow=narrow,
            wide=max(narrow, 4),
        )  # fmt: skip

    def tables(self, sequence: SequenceContext) -> list[Tensor]:
        """The rotary tables belong to the model; layers share them."""
        mixer = self.model.blocks[0].mixer
        for branch in () if mixer is None else mixer.branches:
            if isinstance(branch.core, SoftmaxAttention):
                (rotation,) = branch.core.operands(torch.empty(0, dtype=self.dtype), sequence)
                sinks = torch.empty(1, self.config.sinks.num_tokens, dtype=self.dtype)
                (of_sinks,) = branch.core.sink_operands(sinks)
                found = [rotation] if of_sinks is None else [rotation, of_sinks]
                return [table for each in found for table in (each.cos, each.sin)]
        return []

    def streams(self, rows: int, length: int) -> list[Tensor]:
        """What a block takes."""
        width, count = self.config.hidden_size, self.config.sinks.num_tokens
        shapes = [(rows, length, width)] + ([(1, count, width)] if count else [])
        return [torch.randn(shape, dtype=self.dtype, requires_grad=True) for shape in shapes]

    def run(self, streams: list[Tensor], sequence: SequenceContext) -> tuple[Tensor, ...]:
        x, *sinks = streams
        is_on = self.spiking.neuron is NeuronKind.adaptive
        routing = Routing(num_rows=x.shape[0], num_tokens=x.shape[0] * x.shape[1])
        spikes = Spikes(3.0) if is_on else None
        out = self.model.blocks[0](x, sequence, spikes, routing, *sinks)
        return out if isinstance(out, tuple) else (out,)

    def footprint(self, rows: int, length: int, *, sinks_are_read: bool = True) -> Footprint:
        mixers, ffn = self.config.layers.mixers[0], self.config.layers.ffns[0]
        work = self.workload(rows, length)
        return block_footprint(work, mixers, ffn, self.again, sinks_are_read=sinks_are_read)


def assert_kept(real: Real, rows: int, length: int, *, sinks_are_read: bool = True) -> None:
    sequence = SequenceContext.one_document_per_row(rows, length)
    streams = real.streams(rows, length)
    besides = (*streams, *real.model.parameters(), *real.tables(sequence), sequence.positions)
    outs: list[Tensor] = []

    def forward() -> list[Tensor]:
        outs.extend(real.run(streams, sequence)[: 2 if sinks_are_read else 1])
        return outs

    kept = kept_bytes(forward, besides=besides)
    planned = real.footprint(rows, length, sinks_are_read=sinks_are_read)
    # Planned is the input, which is not counted here; counted is the output, which is not planned.
    (taken, made) = (sum(x.nbytes for x in each) for each in (streams, outs))
    assert planned.kept - taken == kept - made
    assert (planned.takes, planned.makes) == (taken, made)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("spiking", SPIKING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_block_keeps_what_is_planned(name: str, spiking: str, dtype: torch.dtype) -> None:
    real = Real(name, SPIKING[spiking], dtype)
    for rows, length in SHAPES:
        assert_kept(real, rows, length)


@pytest.mark.parametrize("name", WITH_SINKS)
@pytest.mark.parametrize(
    ("spiking", "dtype"),
    [("off", torch.bfloat16), ("detached", torch.float64), ("through", torch.float32)],
)
def test_a_block_with_sinks_keeps_what_is_planned(
    name: str, spiking: str, dtype: torch.dtype
) -> None:
    real = Real(name, SPIKING[spiking], dtype)
    for rows, length in SHAPES:
        for are_read in (True, False):
            assert_kept(real, rows, length, sinks_are_read=are_read)


SINKS_AGAIN = [
    *((name, again) for name in (
        "F before", "S none", "L sinks", "L past", "L+S sinks", "L+S past",
        "F+L shared-after_output-learned", "F+L separate-before_output-learned",
    ) for again in AGAIN),
    *(("F sinks, capacity", again) for again in EXPERTS_AGAIN),
]  # fmt: skip


@pytest.mark.parametrize(("name", "again"), SINKS_AGAIN)
@pytest.mark.parametrize("spiking", ["off", "detached"])
def test_a_block_with_sinks_that_computes_parts_again_keeps_what_is_planned(
    name: str, again: str, spiking: str
) -> None:
    real = Real(name, SPIKING[spiking], torch.bfloat16, EXPERTS_AGAIN[again])
    for are_read in (True, False):
        assert_kept(real, 2, 200, sinks_are_read=are_read)


@pytest.mark.parametrize(
    "name",
    ["F", "S", "L", "L qk_norm", "L floor", "L+S", "L+S key-tied",
     "L+F shared-after_output-learned", "L+F separate-before_output-learned"],
)  # fmt: skip
@pytest.mark.parametrize("again", AGAIN)
@pytest.mark.parametrize("spiking", ["off", "detached"])
def test_a_block_that_computes_parts_again_keeps_what_is_planned(
    name: str, again: str, spiking: str
) -> None:
    assert_kept(Real(name, SPIKING[spiking], torch.bfloat16, AGAIN[again]), 2, 200)


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("again", EXPERTS_AGAIN)
@pytest.mark.parametrize("spiking", ["off", "detached"])
def test_experts_that_are_computed_again_keep_what_is_planned(
    name: str, again: str, spiking: str
) -> None:
    assert_kept(Real(f"_ {name}", SPIKING[spiking], torch.bfloat16, EXPERTS_AGAIN[again]), 2, 200)


@pytest.mark.parametrize(
    "name",
    ["F", "S", "L", "_", "L floor", "L+S", "L+F shared-after_output-learned",
     "L+F separate-before_output-mean"],
)  # fmt: skip
@pytest.mark.parametrize("again", [None, "norms", "activations", "all parts"])
def test_the_peak_of_a_backward_is_close(name: str, again: str | None) -> None:
    assert_peak(name, SPIKING["detached"], again)


@pytest.mark.parametrize("name", ["top 1", "top 2, shared", "capacity", "tight", "sigmoid"])
@pytest.mark.parametrize("again", [None, *EXPERTS_AGAIN])
def test_the_peak_of_experts_is_close(name: str, again: str | None) -> None:
    assert_peak(f"_ {name}", SPIKING["detached"], again)


@pytest.mark.parametrize(
    "name",
    ["F before", "F none", "S before", "S none", "L sinks", "L+S sinks", "L+S past",
     "F+L shared-after_output-learned", "F+L separate-before_output-mean",
     "F sinks, capacity"],
)  # fmt: skip
@pytest.mark.parametrize("again", [None, "norms", "all parts"])
def test_the_peak_with_sinks_is_close(name: str, again: str | None) -> None:
    assert_peak(name, SPIKING["detached"], again)


def assert_peak(name: str, spiking: SpikingConfig, again: str | None) -> None:
    real = Real(
        name, spiking, torch.float32, EXPERTS_AGAIN.get(again or ""), hidden_size=96,
        intermediate_size=256, head_dim=24, window_tokens=64,
    )  # fmt: skip
    rows, length = 2, 512
    sequence = SequenceContext.one_document_per_row(rows, length)
    real.tables(sequence)
    scalar = torch.ones((), requires_grad=True)

    shapes = [x.shape for x in real.streams(rows, length)]

    def step() -> None:
        streams = [torch.zeros(shape).add_(scalar) for shape in shapes]
        gradients = [torch.ones_like(x) for x in streams]
        outs = real.run(streams, sequence)
        edges = [torch.autograd.graph.get_gradient_edge(x) for x in outs]
        del streams, outs
        torch.autograd.backward(edges, gradients)
        real.model.zero_grad()

    planned = real.footprint(rows, length)
    # The gradient is there from the start of the step here.
    peak = max(planned.backward_peak, planned.forward_peak + planned.makes)
    assert peak == pytest.approx(peak_bytes(step), rel=0.04)


def test_the_head_keeps_its_input_and_one_number_a_token() -> None:
    real = Real("_", SPIKING["off"], torch.float32)
    work = real.workload(2, 30)
    found = head_footprint(work, 50, chunk_tokens=16)
    stream = 2 * 30 * 24 * 4
    # Input and output of the final norm, its reciprocal, the log normaliser.
    assert found.kept == 2 * stream + 2 * 60 * 4
    assert found.weight_gradients == 50 * 24 * 4 + 24 * 4
    # Two chunks of logits at a time, where there are several.
    assert (
        found.backward_peak - head_footprint(work, 50, chunk_tokens=60).backward_peak
        == (2 * 16 - 60) * 50 * 4
    )


def test_a_cut_vocabulary_needs_more_for_the_embedding() -> None:
    real = Real("_", SPIKING["off"], torch.float32)
    work = real.workload(2, 30)
    whole = embedding_footprint(work, 50)
    stream = 2 * 30 * 24 * 4
    assert (whole.kept, whole.forward_peak, whole.weight_gradients) == (0, stream, 50 * 24 * 4)
    cut = Workload(
        model=work.model, spiking=work.spiking, rows=2, length=30, narrow=4, wide=4, tp=2,
        sequence_parallel=True,
    )  # fmt: skip
    assert embedding_footprint(cut, 64).forward_peak == stream // 2 + 2 * stream


def test_flash_attention_keeps_operands_output_and_a_sum_a_query() -> None:
    heads = Heads(2, 100, num_queries=4, num_keys=2, dim=8, narrow=2, wide=4)
    found = softmax_memory("flash_attn", heads, window=16)
    assert found.operands == {"q", "k", "v"}
    assert found.keeps_output
    assert found.aside == 2 * 100 * 4 * 4
