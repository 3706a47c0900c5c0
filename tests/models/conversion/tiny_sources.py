"""Tiny Hugging Face models with random weights, and exact oracles for what they round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-windows": (
        "qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN_ROPE}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-bias": ("qwen3", {"head_dim": 8, "attention_bias": True}),
    "llama": ("llama", {"rope_parameters": LLAMA3_ROPE, "head_dim": 8}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": (
        "llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "mistral": ("mistral", {"sliding_window": 7, "head_dim": 12}),
    "mistral-full": ("mistral", {"sliding_window": None}),
}  # fmt: skip


def build(case: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """The transformers model of a case, all parameters random (biases and norms too)."""
    import transformers

    name, extra = CASES[case]
    word = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama", "mistral": "Mistral"}[name]
    config = getattr(transformers, f"{word}Config")(**{**SIZES, **extra, **changes})
    config._attn_implementation = "sdpa"
    model = getattr(transformers, f"{word}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.dim() == 1 and "norm" in key
            parameter.copy_(1 + 0.2 * noise if is_norm else 0.15 * noise)
    return model.to(dtype).eval()


def save(case: str, folder: Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """Save a case with transformers' own writer."""
    shard = options.pop("max_shard_size", "5GB")
    build(case, dtype=dtype, **options).save_pretrained(folder, max_shard_size=shard)
    return folder


class Float64Rotary(nn.Module):
    """The model's rotary tables with angles in float64, from formulas of the papers."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        rope = config.rope_parameters
        dim = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        self.frequencies, self.scale = _frequencies(rope, dim)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].to(torch.float64) * self.frequencies
        table = torch.cat([angles, angles], dim=-1)
        return (table.cos() * self.scale).to(x.dtype), (table.sin() * self.scale).to(x.dtype)


def _frequencies(rope: dict[str, Any], dim: int) -> tuple[Tensor, float]:
    import math

    base = torch.tensor(
        [float(rope["rope_theta"]) ** (-2 * i / dim) for i in range(dim // 2)], dtype=torch.float64
    )
    if rope["rope_type"] == "linear":
        return base / rope["factor"], 1.0
    if rope["rope_type"] == "llama3":
        longest, factor = rope["original_max_position_embeddings"], rope["factor"]
        out = []
        for frequency in base.tolist():
            wavelength = 2 * math.pi / frequency
            if wavelength < longest / rope["high_freq_factor"]:
                out.append(frequency)
            elif wavelength > longest / rope["low_freq_factor"]:
                out.append(frequency / factor)
            else:
                smooth = (longest / wavelength - rope["low_freq_factor"]) / (
                    rope["high_freq_factor"] - rope["low_freq_factor"]
                )
                out.append((1 - smooth) * frequency / factor + smooth * frequency)
        return torch.tensor(out, dtype=torch.float64), 1.0
    if rope["rope_type"] == "yarn":
        longest, factor = rope["original_max_position_embeddings"], rope["factor"]
        theta = rope["rope_theta"]

        def place(turns: float) -> float:
            return dim * math.log(longest / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = max(math.floor(place(32.0)), 0), min(math.ceil(place(1.0)), dim - 1)
        out = []
        for i, frequency in enumerate(base.tolist()):
            ramp = min(max((i - low) / (high - low), 0.0), 1.0)
            out.append(frequency * (1 - ramp) + frequency / factor * ramp)
        return torch.tensor(out, dtype=torch.float64), 0.1 * math.log(factor) + 1.0
    return base, 1.0


def exact(model: Any, *, rotary: bool) -> Any:
    """The same model with torch's own RMSNorm (theirs rounds to float32) and exact rotations."""
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            norm = nn.RMSNorm(module.weight.shape[0], eps=module.variance_epsilon)
            norm.weight = module.weight
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], norm)
    if rotary:
        model.model.rotary_emb = Float64Rotary(model.config)
    return model
