"""Runs a model that is too large to hold: one block at a time, from tensors loaded when needed.

Weights stay in the dtype they are stored in (mapped files cost no memory); the residual stream is
kept for all sample rows in at least float32. Shape letters: R rows, T tokens, D hidden, V words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.block import Block
from models.config import ModelConfig
from models.kernels import KernelSet, default_kernels
from models.layers import LocalLayers, Parts
from models.norm import RMSNorm
from models.rotary import Rotary
from models.sequence import SequenceContext

_VOCABULARY_CHUNK = 8192


@dataclass(frozen=True, slots=True)
class SampleRows:
    """Packed rows of text `[R, T]`: token ids, next-token labels (-100 masked), document ids."""

    tokens: Tensor
    labels: Tensor
    document_ids: Tensor

    @property
    def num_rows(self) -> int:
        """R."""
        return self.tokens.shape[0]

    @property
    def num_tokens(self) -> int:
        """R x T."""
        return self.tokens.numel()

    def sequences(self) -> list[SequenceContext]:
        """One context a row, so that rows run one after another."""
        return [
            SequenceContext.from_document_ids(self.document_ids[row : row + 1])
            for row in range(self.num_rows)
        ]


class BlockStream:
    """One model, given by how to load a parameter by (our) name."""

    def __init__(
        self,
        config: ModelConfig,
        load: Callable[[str], Tensor],
        *,
        kernels: KernelSet | None = None,
    ) -> None:
        self.config = config
        self.load = load
        layers = LocalLayers()
        self._parts = Parts(
            config=config,
            layers=layers,
            kernels=kernels or default_kernels(),
            rotary=Rotary(config),
            build_neuron=lambda _channels: None,
        )

    def embed(self, rows: SampleRows) -> list[Tensor]:
        """The residual stream before the first block: R tensors `[1, T, D]`.

        Raises:
            ValueError: a token id that the vocabulary does not have.
        """
        largest = int(rows.tokens.max())
        if largest >= self.config.vocab_size:
            raise ValueError(
                f"sample text token id ({largest}) must be below vocab_size: got "
                f"{self.config.vocab_size}. Prepare the text with the source's tokenizer."
            )
        weight = self.load("embedding.weight")
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return [F.embedding(row[None], weight).to(dtype) for row in rows.tokens]

    def sinks(self) -> Tensor | None:
        """The stream of sinks before the first block `[1, S, D]`, where the model has any."""
        if not self.config.uses_sinks:
            return None
        weight = self.load("sinks.weight")
        return weight.to(torch.promote_types(weight.dtype, torch.float32))[None]

    def block(self, layer: int) -> Block:
        """Block `layer` with its weights, without gradients."""
        mixers = self.config.layers.mixers[layer]
        with torch.device("meta"):
            block = Block(self._parts, mixers, layer=layer)
        fill(block, f"blocks.{layer}.", self.load)
        return block

    def final_norm(self) -> RMSNorm:
        """The norm before the head."""
        with torch.device("meta"):
            norm = RMSNorm(self.config.hidden_size, self.config.rms_norm_eps)
        fill(norm, "final_norm.", self.load)
        return norm

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[M, V]` of final-normed `[M, D]`; casts a part of the head at a time."""
        tied = self.config.tie_word_embeddings
        weight = self.load("embedding.weight" if tied else "head.weight")
        parts = torch.split(weight, _VOCABULARY_CHUNK)
        return torch.cat([F.linear(hidden, part.to(hidden.dtype)) for part in parts], dim=-1)


@torch.no_grad()
def advance(
    block: Block,
    hidden: list[Tensor],
    sequences: list[SequenceContext],
    sinks: Tensor | None = None,
) -> Tensor | None:
    """Replace every row's residual stream by the block's output; returns that of sinks."""
    after = None
    for row, sequence in enumerate(sequences):
        out = block(hidden[row], sequence, sinks=sinks)
        hidden[row], after = out if sinks is not None else (out, None)
    return after


def fill(module: nn.Module, prefix: str, load: Callable[[str], Tensor]) -> None:
    """Give a meta module its parameters as they are stored, frozen."""
    names = [name for name, _ in module.named_parameters()]
    values = {name: _one_memory(load(prefix + name)) for name in names}
    module.load_state_dict(values, assign=True)
    module.requires_grad_(False)


def _one_memory(tensor: Tensor) -> Tensor:
    """Copies that share memory, wide enough that computing with them does not unshare it."""
    if tensor.dim() == 0 or tensor.stride(0) != 0 or tensor.shape[0] == 1:
        return tensor
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return tensor[:1].to(wide).expand_as(tensor)
