"""The cut layers of two ranks against whole ones: values, every gradient, what a neuron sees."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from models.expert_config import ExpertConfig
from models.grouped_linear import Groups
from models.layers import LayerProvider, LocalLayers
from models.mixer_config import SinkConfig
from models.spiking.channels import TokenShare, mean_abs
from parallel.config import ParallelConfig
from parallel.tensor_parallel import (
    TensorParallelLayers,
    check_sequence_length,
    check_sinks,
    check_tensor_parallel,
)
from tests.models.tiny import tiny_config
from tests.support.closeness import assert_close
from tests.support.distributed import run_ranks

RANKS = 2
ROWS, TOKENS, IN, OUT = 2, 6, 8, 4
VOCAB = 13
MULTIPLES = {"even": 1, "padded": 8, "all padding": 32}
"""13 rows become 14, 16 and 32: on the last rank 1, 3 and 16 of its rows are padding."""
MODES = [(False, "whole rows"), (True, "sequence parallel")]


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(shape, dtype=torch.float64).normal_(generator=generator)


X, WEIGHT, BIAS = normal(0, ROWS, TOKENS, IN), normal(1, OUT, IN), normal(2, OUT)
GRADIENT = normal(3, ROWS, TOKENS, OUT)
TABLE, STREAM_GRADIENT = normal(4, VOCAB, IN), normal(5, ROWS, TOKENS, IN)
TOKEN_IDS = torch.tensor([[0, 12, 7, 6, 12, 1], [5, 8, 6, 0, 11, 7]])


def share(x: Tensor, dim: int, rank: int) -> Tensor:
    return x.chunk(RANKS, dim=dim)[rank]


def layers(*, sequence_parallel: bool = False, multiple: int = 1) -> TensorParallelLayers:
    group = dist.group.WORLD
    assert group is not None
    return TensorParallelLayers(group, sequence_parallel=sequence_parallel, vocab_multiple=multiple)


def stream(x: Tensor, rank: int, *, sequence_parallel: bool) -> Tensor:
    """This rank's tokens of a residual stream."""
    return share(x, 1, rank) if sequence_parallel else x


@dataclass(frozen=True)
class Result:
    """A layer's output on one rank, and gradients of its input and parameters."""

    out: Tensor
    gradients: dict[str, Tensor]


def run_layer(layer: nn.Module, x: Tensor, gradient: Tensor) -> Result:
    x = x.clone().requires_grad_(x.is_floating_point())
    out = layer(x)
    out.backward(gradient)
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    if x.grad is not None:
        gradients["x"] = x.grad
    return Result(out.detach(), gradients)


def filled(layer: nn.Module, **values: Tensor) -> nn.Module:
    layer.double()
    for name, value in values.items():
        parameter = layer.get_parameter(name)
        assert bool(parameter.isnan().all()), "parameters start as NaN"
        parameter.data[: value.shape[0]] = value
    return layer


def row_linear(rank: int, *, sequence_parallel: bool, bias: bool) -> Result:
    layer = layers(sequence_parallel=sequence_parallel).row_linear(IN, OUT, bias=bias)
    values = {"weight": share(WEIGHT, 1, rank)} | ({"bias": BIAS} if bias else {})
    gradient = stream(GRADIENT, rank, sequence_parallel=sequence_parallel)
    return run_layer(filled(layer, **values), share(X, 2, rank), gradient)


def column_linear(rank: int) -> Result:
    """Inside a region: the input is whole, its gradient this rank's part of a sum."""
    layer = layers().column_linear(IN, OUT, bias=True)
    values = {"weight": share(WEIGHT, 0, rank), "bias": share(BIAS, 0, rank)}
    return run_layer(filled(layer, **values), X, share(GRADIENT, 2, rank))


def embedding(rank: int, multiple: int, *, sequence_parallel: bool) -> Result:
    layer = layers(sequence_parallel=sequence_parallel, multiple=multiple).embedding(VOCAB, IN)
    rows = layer.get_parameter("weight").shape[0]
    filled(layer, weight=TABLE[rank * rows : (rank + 1) * rows])
    gradient = stream(STREAM_GRADIENT, rank, sequence_parallel=sequence_parallel)
    return run_layer(layer, TOKEN_IDS, gradient)


def megatron_embedding(rank: int, multiple: int) -> Result:
    """megatron-core's, on the padded number of rows."""
    from megatron.core import ModelParallelConfig
    from megatron.core.tensor_parallel.layers import VocabParallelEmbedding

    config = ModelParallelConfig(use_cpu_initialization=True, perform_initialization=False)
    rows = -(-VOCAB // max(multiple, RANKS)) * max(multiple, RANKS)
    layer = VocabParallelEmbedding(
        rows, IN, init_method=nn.init.zeros_, config=config, tp_group=dist.group.WORLD
    ).double()
    first = rank * rows // RANKS
    layer.weight.data.fill_(torch.nan)
    held = TABLE[first : first + rows // RANKS]
    layer.weight.data[: held.shape[0]] = held
    return run_layer(layer, TOKEN_IDS, STREAM_GRADIENT)


def channel_mean(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The mean, and two gradients: each rank goes on with the mean in its own way."""
    channels = layers().cut_channels
    x = share(X, 2, rank).clone().requires_grad_()
    mean = channels.mean_abs(x)
    (gradient,) = torch.autograd.grad(mean, x, normal(20 + rank, ROWS, TOKENS, 1))
    low = channels.mean_abs(x.detach().bfloat16())
    return mean.detach(), gradient, low


COUNTS = [5, 0, 7]
EXPERT_WEIGHTS = {
    "gate_proj.weight": normal(6, len(COUNTS), OUT, IN),
    "up_proj.weight": normal(7, len(COUNTS), OUT, IN),
    "down_proj.weight": normal(8, len(COUNTS), IN, OUT),
}


class ExpertRegion(nn.Module):
    """Experts between the borders of their region, the first tokens to the first expert."""

    def __init__(self, provider: LayerProvider) -> None:
        super().__init__()
        self.provider = provider
        self.experts = provider.experts(
            len(COUNTS), IN, OUT, neuron=None, layer=0, activations_again=False
        )

    def forward(self, x: Tensor) -> Tensor:
        entered = self.provider.enter(x)
        out = self.experts(entered.flatten(0, 1), Groups(torch.tensor(COUNTS)))
        return self.provider.leave(out.view_as(entered))


def experts(rank: int, *, sequence_parallel: bool) -> Result:
    region = ExpertRegion(layers(sequence_parallel=sequence_parallel)).double()
    for name, value in EXPERT_WEIGHTS.items():
        dim = 2 if name.startswith("down") else 1
        filled(region.experts, **{name: share(value, dim, rank)})
    x, gradient = (
        stream(values, rank, sequence_parallel=sequence_parallel) for values in (X, STREAM_GRADIENT)
    )
    return run_layer(region, x, gradient)


def all_layers(rank: int, world_size: int) -> dict[str, Any]:
    results: dict[str, Any] = {"column": column_linear(rank), "mean": channel_mean(rank)}
    for split, mode in MODES:
        results[f"experts {mode}"] = experts(rank, sequence_parallel=split)
        results[f"row {mode}"] = row_linear(rank, sequence_parallel=split, bias=True)
        results[f"row without bias {mode}"] = row_linear(rank, sequence_parallel=split, bias=False)
        for name, multiple in MULTIPLES.items():
            found = embedding(rank, multiple, sequence_parallel=split)
            results[f"embedding {name} {mode}"] = found
    for name, multiple in MULTIPLES.items():
        results[f"megatron {name}"] = megatron_embedding(rank, multiple)
    results["channels"] = {
        mode: (layers(sequence_parallel=split).whole_channels, layers().cut_channels)
        for split, mode in MODES
    }
    results["channels"] = {
        mode: [(c.share, c.is_counted) for c in pair] for mode, pair in results["channels"].items()
    }
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("layers")
    return run_ranks(all_layers, RANKS, tmp_path=folder)


def whole_linear(*, bias: bool) -> Result:
    layer = nn.Linear(IN, OUT, bias=bias).double()
    layer.weight.data.copy_(WEIGHT)
    if bias:
        layer.bias.data.copy_(BIAS)
    return run_layer(layer, X, GRADIENT)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("split", "mode"), MODES)
def test_a_row_linear_adds_its_bias_once(
    results: list[dict[str, Any]], split: bool, mode: str, bias: bool
) -> None:
    expected = whole_linear(bias=bias)
    biases = []
    for rank, result in enumerate(results):
        found: Result = result[f"row {mode}" if bias else f"row without bias {mode}"]
        out = stream(expected.out, rank, sequence_parallel=split)
        assert_close(found.out, out, relative=1e-14, name="output")
        for name, dim in (("x", 2), ("weight", 1)):
            gradient = share(expected.gradients[name], dim, rank)
            assert_close(found.gradients[name], gradient, relative=1e-14, name=name)
        biases.append(found.gradients.get("bias"))
    if bias:
        # Of whole rows each rank has the whole gradient, of cut ones its tokens' part.
        total = biases[0] + biases[1] if split else biases[0]
        assert_close(total, expected.gradients["bias"], relative=1e-14, name="bias")
        assert torch.equal(biases[0], biases[1]) is not split
    else:
        assert biases == [None, None]


def test_a_column_linear_holds_its_rows_of_weight_and_bias(results: list[dict[str, Any]]) -> None:
    expected = whole_linear(bias=True)
    for rank, result in enumerate(results):
        found: Result = result["column"]
        assert_close(found.out, share(expected.out, 2, rank), relative=1e-14, name="output")
        for name in ("weight", "bias"):
            gradient = share(expected.gradients[name], 0, rank)
            assert_close(found.gradients[name], gradient, relative=1e-14, name=name)
    parts = [result["column"].gradients["x"] for result in results]
    assert_close(sum(parts), expected.gradients["x"], relative=1e-14, name="x")


@pytest.mark.parametrize(("split", "mode"), MODES)
def test_experts_are_cut_by_their_inner_channels(
    results: list[dict[str, Any]], split: bool, mode: str
) -> None:
    region = ExpertRegion(LocalLayers()).double()
    filled(region.experts, **EXPERT_WEIGHTS)
    expected = run_layer(region, X, STREAM_GRADIENT)
    for rank, result in enumerate(results):
        found: Result = result[f"experts {mode}"]
        assert found.gradients.keys() == expected.gradients.keys()
        for name, whole in (("x", expected.gradients["x"]), ("output", expected.out)):
            value = found.out if name == "output" else found.gradients["x"]
            held = stream(whole, rank, sequence_parallel=split)
            assert_close(value, held, relative=1e-14, name=name)
        for name, dim in (("gate_proj", 1), ("up_proj", 1), ("down_proj", 2)):
            name = f"experts.{name}.weight"
            gradient = share(expected.gradients[name], dim, rank)
            assert_close(found.gradients[name], gradient, relative=1e-14, name=name)


@pytest.mark.parametrize("name", MULTIPLES)
@pytest.mark.parametrize(("split", "mode"), MODES)
def test_an_embedding_finds_its_rows_on_any_rank(
    results: list[dict[str, Any]], split: bool, mode: str, name: str
) -> None:
    table = TABLE.clone().requires_grad_()
    expected = F.embedding(TOKEN_IDS, table)
    expected.backward(STREAM_GRADIENT)
    assert table.grad is not None
    held: list[Tensor] = []
    for rank, result in enumerate(results):
        found: Result = result[f"embedding {name} {mode}"]
        out = stream(expected.detach(), rank, sequence_parallel=split)
        assert torch.equal(found.out, out), f"rank {rank}"
        held.append(found.gradients["weight"])
    gradient = torch.cat(held)
    assert gradient.shape[0] == {"even": 14, "padded": 16, "all padding": 32}[name]
    assert_close(gradient[:VOCAB], table.grad, relative=1e-15, name="table")
    assert not gradient[VOCAB:].any(), "padding has no gradient"


@pytest.mark.parametrize("name", MULTIPLES)
def test_an_embedding_is_that_of_megatron_core(results: list[dict[str, Any]], name: str) -> None:
    for result in results:
        found: Result = result[f"embedding {name} whole rows"]
        expected: Result = result[f"megatron {name}"]
        assert torch.equal(found.out, expected.out)
        assert torch.equal(found.gradients["weight"], expected.gradients["weight"])


def test_the_channel_mean_is_that_of_all_channels(results: list[dict[str, Any]]) -> None:
    """Its gradient is of what all ranks did with it."""
    x = X.clone().requires_grad_()
    mean = mean_abs(x)
    used = sum(normal(20 + rank, ROWS, TOKENS, 1) for rank in range(RANKS))
    (gradient,) = torch.autograd.grad(mean, x, used)
    for rank, result in enumerate(results):
        found, found_gradient, low = result["mean"]
        assert_close(found, mean, relative=1e-15, name="mean")
        assert_close(found_gradient, share(gradient, 2, rank), relative=1e-15, name="gradient")
        assert low.dtype is torch.float32
        assert_close(low, mean_abs(X.bfloat16()), relative=1e-6, name="bfloat16 input")


def test_each_value_is_counted_on_one_rank(results: list[dict[str, Any]]) -> None:
    """Whole channels of whole rows are the same on both; everything else is somebody's own."""
    for rank, result in enumerate(results):
        whole_rows, cut_rows = (result["channels"][mode] for _, mode in MODES)
        assert whole_rows[0] == (TokenShare(), rank == 0)
        assert cut_rows[0] == (TokenShare(rank, RANKS), True)
        assert whole_rows[1] == cut_rows[1] == (TokenShare(), True)


@pytest.mark.parametrize(
    ("changes", "tp", "message"),
    [
        ({}, 4, r"parallel\.tp \(4\) must divide model\.num_key_value_heads: got 2\. The largest "
                r"valid tp below it is 2; use parallel\.pp or parallel\.dp for more ranks\."),
        ({}, 3, r"\(3\) must divide model\.num_attention_heads: got 4\. The largest valid tp below "
                r"it is 2;"),
        ({"intermediate_size": 33}, 2, r"\(2\) must divide model\.intermediate_size: got 33\. The "
                                       r"largest valid tp below it is 1;"),
        ({"num_key_value_heads": 4, "intermediate_size": 40}, 16, r"largest valid tp .* is 4"),
        ({"ffns": "d e d d", "moe": ExpertConfig(intermediate_size=9)}, 2,
         r"\(2\) must divide model\.moe\.intermediate_size: got 9\. The largest valid tp below it "
         r"is 1;"),
    ],
)  # fmt: skip
def test_a_tp_that_cuts_nothing_evenly_is_refused(
    changes: dict[str, Any], tp: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_tensor_parallel(tiny_config(**changes), tp)


def test_a_tp_that_divides_heads_and_channels_passes() -> None:
    for tp in (1, 2):
        check_tensor_parallel(tiny_config(), tp)
    # The vocabulary is padded, so it need not be divided.
    check_tensor_parallel(tiny_config(num_key_value_heads=4, vocab_size=61), 4)


@pytest.mark.parametrize(("count", "valid"), [(10, "8 or 12"), (3, "4")])
def test_sinks_that_cannot_be_cut_are_refused(count: int, valid: str) -> None:
    parallel = ParallelConfig(tp=4, sequence_parallel=True)
    message = (
        rf"model\.sinks\.num_tokens \({count}\) must be a multiple of parallel\.tp with "
        rf"sequence_parallel: got 4\. Set it to {valid}, or parallel\.sequence_parallel=false\."
    )
    with pytest.raises(ValueError, match=message):
        check_sinks(tiny_config(sinks=SinkConfig(num_tokens=count)), parallel)
    check_sinks(tiny_config(), parallel)
    check_sinks(tiny_config(sinks=SinkConfig(num_tokens=12)), parallel)
    check_sinks(tiny_config(sinks=SinkConfig(num_tokens=count)), ParallelConfig(tp=4))


@pytest.mark.parametrize(("length", "valid"), [(10, "8 or 12"), (3, "4")])
def test_rows_that_cannot_be_cut_are_refused(length: int, valid: str) -> None:
    parallel = ParallelConfig(tp=4, sequence_parallel=True)
    message = (
        rf"stages\.main\.sequence_length \({length}\) must be a multiple of parallel\.tp with "
        rf"sequence_parallel: got 4\. Set it to {valid}, or parallel\.sequence_parallel=false\."
    )
    with pytest.raises(ValueError, match=message):
        check_sequence_length(length, parallel, stage="main")
    check_sequence_length(12, parallel, stage="main")
    check_sequence_length(length, ParallelConfig(tp=4), stage="main")
