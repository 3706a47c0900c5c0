"""The certificate of a conversion: where every tensor comes from and what changed in numbers.

The numeric part runs source and target side by side, block by block, on the same text.
Shape letters: T tokens, D hidden, V vocabulary, G key-value heads, H head dim.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.block import Block
from models.config import ModelConfig
from models.conversion.attention_transfer import Progress
from models.conversion.block_stream import BlockStream, SampleRows, advance
from models.conversion.convert import plan_conversion, unused_tensors
from models.conversion.huggingface import TensorSource
from models.conversion.new_parameters import ConversionOptions
from models.conversion.source_checks import upcycled
from models.conversion.source_config import read_config, read_format
from models.conversion.target_tensor import TargetTensor
from models.layouts import parameter_layouts
from models.linear_attention import GatedLinearAttention
from models.loss import MASKED
from models.projections import HeadProjections
from models.sequence import SequenceContext

FORMAT_VERSION = 1
HALF_LIFE_EDGES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0)
"""Tokens; the histogram has one bin below, one between each two, one above."""

_LOGIT_CHUNK_TOKENS = 256


def build_certificate(
    source: TensorSource,
    target: ModelConfig,
    options: ConversionOptions,
    plan: Sequence[TargetTensor],
    *,
    alignment: Sequence[dict[str, Any]] = (),
    numeric: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The whole certificate as JSON values; `numeric` None says that that part was skipped."""
    kinds = Counter(tensor.origin.kind.value for tensor in plan)
    unused = unused_tensors(source, list(plan))
    layers = read_config(source.config).layers
    return {
        "format_version": FORMAT_VERSION,
        "source": {
            "format": read_format(source.config).value,
            "pattern": layers.describe(),
            "num_tensors": len(source.names()),
            "unused_tensors": unused,
        },
        "target": {"pattern": target.layers.describe(), "num_tensors": len(plan)},
        "options": _plain(asdict(options)),
        "origins": {kind: kinds.get(kind, 0) for kind in ("copied", "reshaped", "scaled", "new")},
        "unexplained_tensors": sorted(parameter_layouts(target).keys() - {t.name for t in plan}),
        "tensors": {
            tensor.name: {
                "origin": tensor.origin.kind.value,
                "source": list(tensor.origin.sources),
                "note": tensor.origin.note,
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype).removeprefix("torch."),
            }
            for tensor in plan
        },
        "alignment": list(alignment),
        "numeric": {"skipped": True} if numeric is None else {"skipped": False, **numeric},
    }


def compare_numerically(
    source: TensorSource,
    target: ModelConfig,
    plan: Sequence[TargetTensor],
    rows: SampleRows,
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Hidden-state error of each layer, logit KL and perplexities, and the state of `L` layers."""
    config = read_config(source.config)
    loads = {tensor.name: tensor.load for tensor in plan_conversion(source, config)}
    target_loads = {tensor.name: tensor.load for tensor in plan}
    before = _Side(BlockStream(config, lambda name: loads[name]()), rows)
    after = _Side(BlockStream(target, lambda name: target_loads[name]()), rows)
    layers, linear, experts = [], [], []
    are_upcycled = set(upcycled(config, target))
    for layer, (old, new) in enumerate(
        zip(config.layers.mixers, target.layers.mixers, strict=True)
    ):
        dense, block = before.stream.block(layer), after.stream.block(layer)
        before.step(dense)
        for branch in () if block.mixer is None else block.mixer.branches:
            if isinstance(branch.core, GatedLinearAttention):
                state = _linear_state(block, branch.projections, branch.core, after)
                linear.append({"layer": layer, **state})
        ratios = _Ratios(block, dense) if layer in are_upcycled else None
        after.step(block)
        if ratios is not None:
            experts.append({"layer": layer, **ratios.summary()})
        layers.append(
            {
                "layer": layer,
                "source": "+".join(kind.value for kind in old) or "_",
                "target": "+".join(kind.value for kind in new) or "_",
                **_difference(before.hidden, after.hidden),
            }
        )
        if progress is not None:
            progress("certificate", layer + 1, config.num_hidden_layers)
    outputs = _compare_outputs(before, after, rows)
    return {
        "tokens": rows.num_tokens,
        "layers": layers,
        **outputs,
        "linear_layers": linear,
        "expert_layers": experts,
    }


@dataclass
class _Side:
    """One of the two models with its residual stream."""

    stream: BlockStream
    rows: SampleRows
    hidden: list[Tensor] = field(init=False)
    sinks: Tensor | None = field(init=False)
    sequences: list[SequenceContext] = field(init=False)

    def __post_init__(self) -> None:
        self.hidden, self.sinks = self.stream.embed(self.rows), self.stream.sinks()
        self.sequences = self.rows.sequences()

    def step(self, block: Block) -> None:
        """Run the next block."""
        self.sinks = advance(block, self.hidden, self.sequences, self.sinks)


class _Ratios:
    """|experts' output| / |the dense FFN's| of every token that an upcycled layer sees."""

    def __init__(self, block: Block, dense: Block) -> None:
        self._dense = dense.ffn
        self._ratios: list[Tensor] = []
        block.ffn.register_forward_hook(self._add)

    def summary(self) -> dict[str, float]:
        """Mean, least and most over tokens; tokens of which the FFN makes nothing are left out."""
        ratios = torch.cat(self._ratios)
        values = {"mean": ratios.mean(), "min": ratios.min(), "max": ratios.max()}
        return {f"output_ratio_{word}": float(value) for word, value in values.items()}

    def _add(self, _module: nn.Module, arguments: tuple[Tensor, ...], out: Tensor) -> None:
        norms = [x.norm(dim=-1).flatten().double() for x in (out, self._dense(arguments[0]))]
        has_output = norms[1] > 0
        self._ratios.append(norms[0][has_output] / norms[1][has_output])


def _difference(before: list[Tensor], after: list[Tensor]) -> dict[str, float]:
    """Relative root-mean-square error and mean cosine over tokens."""
    error = power = cosine = 0.0
    num_tokens = 0
    for old, new in zip(before, after, strict=True):
        error += float((new - old).square().sum(dtype=torch.float64))
        power += float(old.square().sum(dtype=torch.float64))
        cosine += float(F.cosine_similarity(old, new, dim=-1).sum(dtype=torch.float64))
        num_tokens += old.shape[1]
    return {
        "relative_error": math.sqrt(error / power) if power else math.sqrt(error),
        "cosine": cosine / num_tokens,
    }


@torch.no_grad()
def _compare_outputs(before: _Side, after: _Side, rows: SampleRows) -> dict[str, Any]:
    """Mean KL(source || target) in nats a token, and both perplexities on the labels."""
    norms = before.stream.final_norm(), after.stream.final_norm()
    divergence = torch.zeros((), dtype=torch.float64)
    losses = torch.zeros(2, dtype=torch.float64)
    for row in range(rows.num_rows):
        labels = rows.labels[row]
        for start in range(0, labels.shape[0], _LOGIT_CHUNK_TOKENS):
            part = slice(start, start + _LOGIT_CHUNK_TOKENS)
            old = _log_probabilities(before, norms[0], row, part)
            new = _log_probabilities(after, norms[1], row, part)
            for side, values in enumerate((old, new)):
                losses[side] += F.nll_loss(
                    values, labels[part], ignore_index=MASKED, reduction="sum"
                )
            divergence += F.kl_div(new, old, reduction="sum", log_target=True)
    num_targets = max(int((rows.labels != MASKED).sum()), 1)
    old_loss, new_loss = (losses / num_targets).tolist()
    return {
        "logit_kl": float(divergence) / rows.num_tokens,
        "loss": {"source": old_loss, "target": new_loss},
        "perplexity": {"source": _exp(old_loss), "target": _exp(new_loss)},
    }


def _log_probabilities(side: _Side, norm: nn.Module, row: int, part: slice) -> Tensor:
    return F.log_softmax(side.stream.logits(norm(side.hidden[row][0, part])), dim=-1)


@torch.no_grad()
def _linear_state(
    block: Block, projections: HeadProjections, core: GatedLinearAttention, side: _Side
) -> dict[str, Any]:
    """Key bias against W_k x, dead key channels, half-lives, on what this layer really reads."""
    assert block.mixer_norm is not None
    bias = getattr(projections.k_proj, "bias", None)
    norm_sum, num_tokens = 0.0, 0
    largest: Tensor | None = None
    histogram = torch.zeros(len(HALF_LIFE_EDGES) + 1, dtype=torch.float64)
    for hidden in side.hidden:
        x = block.mixer_norm(hidden)
        product = projections.k_proj(x) if bias is None else projections.k_proj(x) - bias
        norm_sum += float(product.norm(dim=-1).sum(dtype=torch.float64))
        num_tokens += x.shape[1]
        heads = projections.project(x)
        row_largest = heads[1].flatten(2).amax(dim=(0, 1))
        largest = row_largest if largest is None else torch.maximum(largest, row_largest)
        half_lives = math.log(2) / -core.log_decay(heads, x)
        edges = torch.tensor(HALF_LIFE_EDGES, dtype=half_lives.dtype)
        bins = torch.bucketize(half_lives.flatten(), edges, right=True)
        histogram += torch.bincount(bins, minlength=len(histogram))
    assert largest is not None
    return {
        "key_bias_norm": 0.0 if bias is None else float(bias.to(torch.float64).norm()),
        "key_projection_norm": norm_sum / num_tokens,
        "dead_key_channels": float((largest <= 0).double().mean()),
        "half_life_tokens": {
            "edges": list(HALF_LIFE_EDGES),
            "share": (histogram / histogram.sum()).tolist(),
        },
    }


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value.value if isinstance(value, Enum) else value for key, value in values.items()}
