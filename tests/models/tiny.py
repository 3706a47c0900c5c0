"""Tiny float64 models and packed batches for the tests of this folder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.config import ModelConfig
from models.initialisation import initialise
from models.kernels import KernelSet
from models.model import Model
from models.reference import linear_attention, softmax_attention
from models.sequence import SequenceContext

REFERENCE_KERNELS = KernelSet(
    linear_attention=linear_attention, softmax_attention=softmax_attention, names={}
)


def tiny_config(**changes: Any) -> ModelConfig:
    """All four mixers, grouped queries, a window shorter than the tests' documents."""
    values: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "mixers": "L S F _",
        "ffns": "d*4",
        "qkv_bias": True,
        "window_tokens": 5,
        "initializer_range": 0.2,
    }
    return ModelConfig(**(values | changes))


def tiny_model(
    config: ModelConfig | None = None, *, dtype: torch.dtype = torch.float64, **options: Any
) -> Model:
    """A model whose every parameter is random, also norms, biases and gates."""
    model = Model(config or tiny_config(), **options)
    initialise(model, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.empty(parameter.shape).normal_(0.0, 0.1, generator=generator)
            parameter.add_(noise)
    return model.to(dtype)


def random_tokens(rows: int, tokens: int, *, vocab_size: int = 61, seed: int = 0) -> Tensor:
    """`[rows, tokens]` token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (rows, tokens), generator=generator)


def packed(lengths: list[list[int]]) -> SequenceContext:
    """A context whose rows hold documents of these lengths."""
    rows = [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths]
    return SequenceContext.from_document_ids(torch.stack(rows))
