"""Tiny models of every pattern, and what transformers makes of their folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.config import ModelConfig
from models.conversion.config_keys import Format
from models.conversion.export import export_folder
from models.conversion.huggingface import TensorEntry
from models.expert_config import Balance, ExpertConfig, RouterScore
from models.mixer_config import (
    BranchConfig,
    BranchMerge,
    BranchNorm,
    BranchProjections,
    FeatureMap,
    GateKind,
    LinearAttentionConfig,
    RopeConfig,
    RopeType,
    SinkConfig,
    SinkRope,
)
from models.model import Model
from models.sequence import SequenceContext
from tests.models.tiny import tiny_config

KEY_TIED = LinearAttentionConfig(
    feature_map=FeatureMap.sigmoid, gate=GateKind.key_tied, gate_offset=1.0, gate_floor=0.1
)
SIGMOID_EXPERTS = ExpertConfig(
    num_experts=5, top_k=2, renormalise=True, score=RouterScore.sigmoid, balance=Balance.bias
)
SOFTMAX_EXPERTS = ExpertConfig(
    num_experts=4, num_shared_experts=2, intermediate_size=12, balance=Balance.previous_step,
    tie_break_seed=7,
)  # fmt: skip
NO_SHARED_EXPERTS = ExpertConfig(num_experts=3, num_shared_experts=0, top_k=2)


LEARNED = BranchConfig(merge=BranchMerge.learned)
SEPARATE, AFTER = BranchProjections.separate, BranchNorm.after_output
CASES: dict[str, dict[str, Any]] = {
    "all mixers": {},
    "key-tied": {"linear": KEY_TIED, "tie_word_embeddings": True, "window_includes_self": False},
    "biases": {"output_bias": True, "ffn_bias": True, "qkv_bias": False, "mixers": "[L F]*2"},
    "linear rope": {"rope": RopeConfig(type=RopeType.linear, factor=4.0), "mixers": "F S F F"},
    "llama3 rope": {
        "rope": RopeConfig(
            type=RopeType.llama3, factor=8.0, theta=1e4, original_max_position_embeddings=64
        ),
    },
    "yarn": {
        "rope": RopeConfig(
            type=RopeType.yarn, factor=4.0, theta=1e4, original_max_position_embeddings=16
        ),
    },
    "yarn ratio": {
        "rope": RopeConfig(
            type=RopeType.yarn, factor=4.0, mscale=1.5, mscale_all_dim=0.5, truncate=False
        ),
        "max_position_embeddings": 64,
    },
    "shared branches": {"mixers": "L+S F S+F F+L"},
    "shared branches, mean": {
        "mixers": "[L+S]*4", "branches": BranchConfig(merge=BranchMerge.mean), "qk_norm": True,
    },
    "shared branches, learned": {
        "mixers": "S+L F S+F F+L", "branches": LEARNED,
    },
    "shared branches, normed after": {
        "mixers": "L+S F S+F F+L",
        "branches": BranchConfig(merge=BranchMerge.learned, norm=AFTER),
        "linear": KEY_TIED,
    },
    "separate branches": {
        "mixers": "L+S F S+F F+L",
        "branches": BranchConfig(merge=BranchMerge.learned, projections=SEPARATE),
        "qk_norm": True,
    },
    "separate branches, normed after": {
        "mixers": "L+S F S+F F+L",
        "branches": BranchConfig(merge=BranchMerge.mean, projections=SEPARATE, norm=AFTER),
        "output_bias": True,
    },
    "sigmoid experts": {"ffns": "d e d e", "moe": SIGMOID_EXPERTS},
    "softmax experts": {"ffns": "e*4", "mixers": "L+S F L+S L+F", "moe": SOFTMAX_EXPERTS},
    "sinks before": {"sinks": SinkConfig(num_tokens=3), "qk_norm": True},
    "absolute sinks": {
        "mixers": "L+S F S+F L", "linear": KEY_TIED, "branches": LEARNED, "ffns": "d e e d",
        "moe": SIGMOID_EXPERTS,
        "sinks": SinkConfig(num_tokens=3, rope=SinkRope.absolute, through_linear=False),
    },
    "sinks without rope": {
        "mixers": "L+S F S+F L",
        "branches": BranchConfig(merge=BranchMerge.mean, projections=SEPARATE, norm=AFTER),
        "sinks": SinkConfig(num_tokens=5, rope=SinkRope.none),
    },
    "sinks beside one of two": {
        "mixers": "L+S F F+L L",
        "branches": BranchConfig(merge=BranchMerge.learned, projections=SEPARATE),
        "sinks": SinkConfig(num_tokens=2, rope=SinkRope.none, through_linear=False),
    },
    "no shared experts": {"ffns": "d e e d", "moe": NO_SHARED_EXPERTS, "linear": KEY_TIED},
}  # fmt: skip


def case(name: str, **changes: Any) -> ModelConfig:
    return tiny_config(**(CASES[name] | changes))


def entries_of(model: Model) -> list[TensorEntry]:
    return [
        TensorEntry(name, tuple(value.shape), value.dtype, value.detach)
        for name, value in model.named_parameters()
    ]


def save(model: Model, folder: Path, **how: Any) -> Path:
    export_folder(entries_of(model), model.config, folder, format=Format.synfire, **how)
    return folder


def open_folder(folder: Path, **how: Any) -> Any:
    """The folder's model, as its users get it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **how).eval()


def logits_of(model: Model, tokens: Tensor, **how: Any) -> Tensor:
    """Synfire's own."""
    with torch.no_grad():
        return model(tokens, SequenceContext.one_document_per_row(*tokens.shape), **how)
