"""Measures what random routers make of copies of one FFN (`upcycle.mode=measured`).

Each layer is measured on what it really reads: the target's own stream, in which the layers before
it are scaled already. Holds one block at a time.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from models.config import ModelConfig
from models.conversion.attention_transfer import Progress
from models.conversion.block_stream import BlockStream, SampleRows, advance
from models.conversion.convert import plan_conversion
from models.conversion.huggingface import TensorSource
from models.conversion.new_parameters import ConversionOptions
from models.conversion.source_checks import upcycled
from models.conversion.source_config import read_config
from models.mixture_of_experts import MixtureOfExperts


@torch.no_grad()
def measure_scales(  # noqa: PLR0913 - source, target, options, what is fitted and the text
    source: TensorSource,
    target: ModelConfig,
    options: ConversionOptions,
    rows: SampleRows,
    *,
    fitted: Mapping[str, tuple[Tensor, str]] | None = None,
    progress: Progress | None = None,
) -> dict[int, float]:
    """Per upcycled layer 1 / the mean over tokens of S + the sum of chosen weights."""
    layers = upcycled(read_config(source.config), target)
    scales: dict[int, float] = {}

    def planned() -> BlockStream:
        found = plan_conversion(source, target, options, fitted=fitted, scales=scales)
        by_name = {tensor.name: tensor for tensor in found}
        return BlockStream(target, lambda name: by_name[name].load())

    stream, sequences = planned(), rows.sequences()
    hidden, sinks = stream.embed(rows), stream.sinks()
    for done, layer in enumerate(range(max(layers, default=-1) + 1), start=1):
        block = stream.block(layer)
        if layer in layers:
            assert isinstance(block.ffn, MixtureOfExperts)
            weights = _WeightSum(block.ffn)
            advance(block, list(hidden), sequences, sinks)
            scales[layer] = 1 / (target.moe.num_shared_experts + weights.mean())
            stream = planned()
            block = stream.block(layer)
        sinks = advance(block, hidden, sequences, sinks)
        if progress is not None:
            progress("measure experts", done, max(layers) + 1)
    return scales


class _WeightSum:
    """Sums the weights of chosen experts over all tokens that a layer sees."""

    def __init__(self, layer: MixtureOfExperts) -> None:
        self._sum, self._num_tokens = 0.0, 0
        layer.register_forward_pre_hook(self._add)

    def mean(self) -> float:
        """Per token."""
        return self._sum / self._num_tokens

    def _add(self, layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, MixtureOfExperts)
        x, positions = arguments[:2]
        choice = layer.router.choose(layer.router(x), positions)
        self._sum += float(choice.weights.sum(dtype=torch.float64))
        self._num_tokens += x.shape[0] * x.shape[1]
