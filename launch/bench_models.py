"""What `launch.bench` runs: our model, Hugging Face's Qwen2 of the same sizes, their steps."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from launch.bench_rows import Setting, Work
from models.config import ModelConfig, NeuronKind, SpikingConfig
from models.conversion.config_keys import Format
from models.conversion.target_config import write_config
from models.cost import flops_per_token, mean_visible
from models.initialisation import initialise
from models.model import Model
from models.recomputation import NOTHING, Recomputation
from models.sequence import SequenceContext
from models.spiking.neurons import Spikes
from parallel.fully_sharded import FLOAT32_MODULES


def build(
    setting: Setting, config: ModelConfig | None = None, *, recompute: Recomputation | None = None
) -> Model:
    """The model of the setting with seeded weights and a neuron, which is silent until asked."""
    config = config or setting.model
    layers = frozenset(range(config.num_hidden_layers))
    if recompute is None:
        recompute = Recomputation(blocks=layers) if setting.recompute else NOTHING
    model = Model(
        config,
        spiking=SpikingConfig(neuron=NeuronKind.adaptive),
        kernels=setting.backend.kernels(),
        recompute=recompute,
    )
    initialise(model, seed=1)
    return to_compute_dtype(model.to(setting.device), setting.dtype)


def to_compute_dtype(model: Model, dtype: torch.dtype) -> Model:
    """Cast to the dtype that training computes in: gates stay at least float32."""
    is_narrow = dtype.itemsize < torch.float32.itemsize
    for name, parameter in model.named_parameters():
        if not (is_narrow and FLOAT32_MODULES & set(name.split("."))):
            parameter.data = parameter.data.to(dtype)
    return model


def full_attention(config: ModelConfig) -> ModelConfig:
    """The same sizes with full attention in every layer."""
    layers = config.num_hidden_layers
    return replace(config, mixers=f"F*{layers}", ffns=f"d*{layers}")


def hugging_face(setting: Setting, attention: str) -> nn.Module:
    """Hugging Face's Qwen2 of the same sizes, every layer full attention."""
    import transformers

    raw = write_config(full_attention(setting.model), Format.qwen2, dtype=torch.float32)
    config = transformers.Qwen2Config(**raw, attn_implementation=attention)
    torch.manual_seed(1)
    with setting.device:
        model: nn.Module = transformers.Qwen2ForCausalLM(config)
    if setting.recompute:
        model.gradient_checkpointing_enable()  # type: ignore[operator]
    return model.to(setting.dtype)


def row_flops(config: ModelConfig, length: int) -> float:
    """Training FLOPs of one document of `length` tokens."""
    visible = (mean_visible([length], window) for window in (None, config.visible_window_tokens))
    return flops_per_token(config, *visible, microbatch_tokens=length) * length


def random_tokens(setting: Setting, length: int) -> Tensor:
    """Seeded tokens `[1, length]`."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, setting.model.vocab_size, (1, length), generator=generator)
    return tokens.to(setting.device)


def our_step(model: Model, length: int, setting: Setting, spikes: Spikes | None = None) -> Work:
    """One optimizer step on one row."""
    tokens = random_tokens(setting, length)
    labels = tokens.roll(-1, dims=1)
    sequence = SequenceContext.one_document_per_row(1, length, device=setting.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def work() -> None:
        loss = model(tokens, sequence, labels=labels, spikes=spikes) / length
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return work


def hugging_face_step(model: nn.Module, length: int, setting: Setting) -> Work:
    """The same step of the Hugging Face model."""
    tokens = random_tokens(setting, length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def work() -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return work
