"""Tiny models as exported folders, opened by the classes that lie in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from models.config import NeuronKind, SpikingConfig
from models.conversion.config_keys import Format
from models.conversion.export import export_folder
from models.conversion.huggingface import TensorEntry
from models.model import Model
from models.spiking.neurons import Spikes


def entries(model: Model) -> list[TensorEntry]:
    """Every parameter of a model."""
    return [
        TensorEntry(name, tuple(p.shape), p.dtype, p.detach) for name, p in model.named_parameters()
    ]


def export_model(model: Model, folder: Path, spikes: Spikes | None = None) -> Path:
    """Write a model in our own format; it spikes as `spikes` say."""
    export_folder(
        entries(model),
        model.config,
        folder,
        format=Format.synfire,
        spiking=model.spiking,
        spikes=spikes,
    )
    return folder


def exported(model: Model, folder: Path, spikes: Spikes | None = None, **options: Any) -> Any:
    """The same model as transformers opens it, by the classes of this checkout."""
    from models.exported.modeling_synfire import SynfireForCausalLM

    export_model(model, folder, spikes)
    options.setdefault("dtype", next(model.parameters()).dtype)
    return SynfireForCausalLM.from_pretrained(folder, **options)


def adaptive(max_count: int | None = None) -> SpikingConfig:
    """Spiking that is on from the first step."""
    return SpikingConfig(neuron=NeuronKind.adaptive, max_count=max_count)


def rows_alone(model: Any, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits of each row by itself."""
    with torch.no_grad():
        return [model(row[None], use_cache=False).logits[0] for row in rows]
