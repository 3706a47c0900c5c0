"""The layer provider of a tensor-parallel rank: its share of heads, channels and vocabulary.

Column linears hold rows of the weight (output channels), row linears columns (input channels), the
embedding and the head rows of the vocabulary. What each parameter's share is, `models.layouts`
says; what crosses the borders, `parallel.regions`. `LocalLayers` is the oracle.
"""

from __future__ import annotations

from math import gcd

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import ModelConfig
from models.layer_pattern import FfnKind
from models.layers import Embedding, Head, Linear
from models.spiking.channels import Channels, TokenShare
from parallel.config import ParallelConfig
from parallel.experts import expert_builder
from parallel.regions import TensorRegion
from parallel.vocabulary import GroupVocabulary, padded_vocab_size, rows_of_rank


class TensorParallelLayers:
    """Layers cut over `group`; `models.layers.LayerProvider`.

    With `sequence_parallel` the residual stream is cut along its tokens. Experts are cut over
    `ep_group` too, if any. `vocab_multiple`: see
    `ParallelConfig`.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        *,
        sequence_parallel: bool,
        vocab_multiple: int,
        ep_group: dist.ProcessGroup | None = None,
    ) -> None:
        self._build_experts = expert_builder(ep_group)
        self._group, self._vocab_multiple = group, vocab_multiple
        self._size: int = group.size()
        self.region = TensorRegion(group, sequence_parallel)
        rank = group.rank()
        self.whole_channels = Channels(
            share=TokenShare(rank, self._size) if sequence_parallel else TokenShare(),
            # Without sequence parallelism all ranks see the same tokens.
            is_counted=sequence_parallel or rank == 0,
        )
        self.cut_channels = Channels(mean_abs=self._mean_abs)

    def enter(self, x: Tensor) -> Tensor:
        """Residual stream to all tokens; the gradient is summed over ranks."""
        return self.region.enter(x)

    def leave(self, x: Tensor) -> Tensor:
        """Sums over this rank's channels to the residual stream."""
        return self.region.leave(x)

    def column_linear(self, in_features: int, out_features: int, *, bias: bool) -> nn.Module:
        """This rank's output channels."""
        return Linear(in_features, self._share(out_features), bias=bias)

    def row_linear(self, in_features: int, out_features: int, *, bias: bool) -> nn.Module:
        """This rank's input channels; the output is summed over ranks."""
        return RowLinear(self._share(in_features), out_features, self.region, bias=bias)

    def replicated_linear(self, in_features: int, out_features: int, *, bias: bool) -> nn.Module:
        """A whole linear inside a region: its gradient is partial."""
        return Linear(in_features, out_features, bias=bias)

    def embedding(self, num_embeddings: int, dim: int) -> nn.Module:
        """This rank's rows of the vocabulary."""
        vocabulary = self._vocabulary(num_embeddings)
        return VocabularyEmbedding(vocabulary, self._rows(num_embeddings), dim, self.region)

    def head(self, hidden_size: int, vocab_size: int, *, is_tied: bool) -> nn.Module:
        """This rank's rows of the vocabulary, with the loss over all of them."""
        return Head(
            hidden_size,
            self._rows(vocab_size),
            is_tied=is_tied,
            vocabulary=self._vocabulary(vocab_size),
            enter=self.region.enter,
        )

    def experts(
        self,
        num_experts: int,
        hidden_size: int,
        inner_size: int,
        *,
        neuron: nn.Module | None,
        layer: int,
        activations_again: bool,
    ) -> nn.Module:
        """This rank's inner channels of all experts, or of its part of them."""
        return self._build_experts(
            num_experts,
            hidden_size,
            self._share(inner_size),
            neuron=neuron,
            layer=layer,
            activations_again=activations_again,
        )

    def _share(self, features: int) -> int:
        assert features % self._size == 0, "check_tensor_parallel has refused this"
        return features // self._size

    def _rows(self, vocab_size: int) -> int:
        """Rows of this rank, padding included."""
        return padded_vocab_size(vocab_size, self._size, self._vocab_multiple) // self._size

    def _vocabulary(self, vocab_size: int) -> GroupVocabulary:
        rows = rows_of_rank(vocab_size, self._size, self._vocab_multiple, rank=self._group.rank())
        return GroupVocabulary(rows.start, len(rows), self._group)

    def _mean_abs(self, x: Tensor) -> Tensor:
        """Mean of |x| over the channels of all ranks; see `models.spiking.channels.Channels`."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        total = x.abs().sum(dim=-1, keepdim=True, dtype=dtype)
        return self.region.channel_sum(total) / (x.shape[-1] * self._size)


class RowLinear(Linear):
    """A linear over this rank's input channels; the sum over ranks, then the whole bias."""

    def __init__(
        self, in_features: int, out_features: int, region: TensorRegion, *, bias: bool
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self._region = region

    def forward(self, x: Tensor) -> Tensor:
        """Map this rank's `[B, T, in_features]` to the residual stream."""
        out = self._region.leave(F.linear(x, self.weight.to(x.dtype)))
        return out if self.bias is None else out + self.bias.to(x.dtype)


class VocabularyEmbedding(Embedding):
    """Token embedding of this rank's rows `[rows, D]`; other ranks' tokens come from them.

    megatron-core's is the oracle of its tests. It cannot hand over a stream cut along tokens
    without CUDA, and this one does so with half the communication.
    """

    def __init__(
        self, vocabulary: GroupVocabulary, num_rows: int, dim: int, region: TensorRegion
    ) -> None:
        super().__init__(num_rows, dim)
        self._first, self._region = vocabulary.first_row, region

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens `[B, T]` to the residual stream."""
        rows = tokens - self._first
        is_elsewhere = (rows < 0) | (rows >= self.weight.shape[0])
        found = F.embedding(rows.masked_fill(is_elsewhere, 0), self.weight)
        return self._region.leave(found.masked_fill(is_elsewhere[..., None], 0.0))


def check_tensor_parallel(config: ModelConfig, tp: int) -> None:
    """Refuse a tp that does not divide what it cuts.

    Raises:
        ValueError: naming what it must divide, both numbers and the largest valid tp.
    """
    cut = {
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "intermediate_size": config.intermediate_size,
    }
    if FfnKind.mixture_of_experts in config.layers.ffns:
        cut["moe.intermediate_size"] = config.expert_intermediate_size
    for name, value in cut.items():
        if value % tp:
            common = gcd(*cut.values())
            largest = max(size for size in range(1, tp) if common % size == 0)
            raise ValueError(
                f"parallel.tp ({tp}) must divide model.{name}: got {value}. The largest valid tp "
                f"below it is {largest}; use parallel.pp or parallel.dp for more ranks."
            )


def check_sinks(config: ModelConfig, parallel: ParallelConfig) -> None:
    """Refuse sinks that cannot be cut evenly like the tokens of rows.

    Raises:
        ValueError: naming both numbers and the nearest valid ones.
    """
    count, tp = config.sinks.num_tokens, parallel.tp
    if not parallel.sequence_parallel or count % tp == 0:
        return
    below = count // tp * tp
    valid = " or ".join(str(number) for number in (below, below + tp) if number)
    raise ValueError(
        f"model.sinks.num_tokens ({count}) must be a multiple of parallel.tp with "
        f"sequence_parallel: got {tp}. Set it to {valid}, or parallel.sequence_parallel=false."
    )


def check_sequence_length(sequence_length: int, parallel: ParallelConfig, *, stage: str) -> None:
    """Refuse rows whose tokens cannot be cut evenly.

    Raises:
        ValueError: naming the stage, both numbers and the nearest valid lengths.
    """
    if not parallel.sequence_parallel or sequence_length % parallel.tp == 0:
        return
    below = sequence_length // parallel.tp * parallel.tp
    valid = " or ".join(str(length) for length in (below, below + parallel.tp) if length)
    raise ValueError(
        f"stages.{stage}.sequence_length ({sequence_length}) must be a multiple of parallel.tp "
        f"with sequence_parallel: got {parallel.tp}. Set it to {valid}, or "
        "parallel.sequence_parallel=false."
    )
