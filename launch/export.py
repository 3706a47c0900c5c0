"""`python -m launch.export`: a checkpoint becomes a Hugging Face folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import TypeAdapter
from torch import Tensor

from launch.compose import command
from models.config import NeuronKind, SpikingConfig
from models.conversion.config_keys import Format
from models.conversion.convert import plan_conversion
from models.conversion.export import MAX_SHARD_BYTES, export_folder
from models.conversion.huggingface import CONFIG, SafetensorsFolder, TensorEntry, read_json
from models.conversion.own_format import read_spikes
from models.conversion.target_config import choose_format, write_config
from models.spiking.neurons import Spikes
from models.spiking.schedule import spikes_at
from models.strict import STRICT
from parallel.checkpoint import tensor_dtypes
from training.weight_source import MODEL, WeightSource, open_weights

logger = logging.getLogger(__name__)


class ExportFormat(Enum):
    """What to write; `auto` is the base's own format, or the first that can hold the model."""

    auto = "auto"
    qwen2 = "qwen2"
    qwen3 = "qwen3"
    llama = "llama"
    mistral = "mistral"
    gla_swa = "gla_swa"
    synfire = "synfire"


class ExportDtype(Enum):
    """Dtype of the written tensors; `keep` leaves each as it is stored."""

    keep = "keep"
    float64 = "float64"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """An export. `checkpoint` is a run folder, one checkpoint or a Hugging Face folder."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    checkpoint: str
    out: str
    format: ExportFormat = ExportFormat.auto
    dtype: ExportDtype = ExportDtype.keep
    max_shard_bytes: int = MAX_SHARD_BYTES

    def __post_init__(self) -> None:
        if self.max_shard_bytes < 1:
            raise ValueError(f"max_shard_bytes ({self.max_shard_bytes}) must be at least 1.")


@command("export", ExportConfig)
def main(config: ExportConfig) -> None:
    """Write a checkpoint as a Hugging Face folder, tensor by tensor.

    Plain Transformers get their base's own format, L/S models the public gla_swa format, all
    others ours (synfire), which transformers runs with trust_remote_code=True.
    """
    export(config)


def export(config: ExportConfig) -> Format:
    """Export; returns the format that was written.

    Raises:
        ValueError: a checkpoint that cannot be read, a model that no format holds, `out` in use.
    """
    source = open_weights(config.checkpoint)
    format = _format(config, source)
    spiking, spikes = _spiking(source)
    write_config(source.model, format, dtype=torch.float32, spiking=spiking)  # refuses early
    _note_spiking(format, spiking, spikes)
    export_folder(
        entries(source, config.dtype),
        source.model,
        Path(config.out),
        format=format,
        tokenizer=source.tokenizer_folder,
        eos_token_id=((source.manifest or {}).get("tokenizer") or {}).get("eos_token_id"),
        spiking=spiking,
        spikes=spikes,
        max_shard_bytes=config.max_shard_bytes,
    )
    logger.info(
        "wrote %s in the %s format: %d tensors", config.out, format.value, len(source.shapes)
    )
    return format


def entries(source: WeightSource, dtype: ExportDtype) -> list[TensorEntry]:
    """Every weight of a checkpoint as an entry that loads it when it is written."""
    loads: Mapping[str, Callable[[], Tensor]]
    if source.manifest is None:
        folder = SafetensorsFolder(source.path)
        plan = plan_conversion(folder, source.model)
        stored = {tensor.name: tensor.dtype for tensor in plan}
        loads = {tensor.name: tensor.load for tensor in plan}
    else:
        dtypes = tensor_dtypes(source.path)
        stored = {name: dtypes[MODEL + name] for name in source.shapes}
        loads = {name: _reader(source, name) for name in source.shapes}
    chosen = None if dtype is ExportDtype.keep else getattr(torch, dtype.value)
    return [
        TensorEntry(name, tuple(shape), chosen or stored[name], loads[name])
        for name, shape in source.shapes.items()
    ]


def _reader(source: WeightSource, name: str) -> Callable[[], Tensor]:
    return lambda: next(iter(source.read([name])))[1]


def _format(config: ExportConfig, source: WeightSource) -> Format:
    if config.format is not ExportFormat.auto:
        return Format[config.format.value]
    return choose_format(source.model, preferred=_base_format(source))


def _base_format(source: WeightSource) -> Format | None:
    """The format that the weights were imported from, as far as anyone wrote it down."""
    return None if source.format is None else Format[source.format]


def _spiking(source: WeightSource) -> tuple[SpikingConfig | None, Spikes | None]:
    """What was asked for, and how the last trained step spiked."""
    if source.manifest is None:
        return read_spikes(read_json(source.path / CONFIG)) or (None, None)
    raw = source.manifest.get("spiking")
    if raw is None:
        return None, None
    spiking = TypeAdapter(SpikingConfig).validate_python(raw)
    return spiking, spikes_at(spiking, max(0, source.manifest.get("step", 0) - 1))


def _note_spiking(format: Format, spiking: SpikingConfig | None, spikes: Spikes | None) -> None:
    """Say whether the exported model spikes."""
    if spiking is None or spiking.neuron is NeuronKind.off:
        return
    if format is not Format.synfire:
        logger.warning(
            "spiking (%s, k = %g) is noted in config.json: the format has no neurons. "
            "format=synfire has.",
            spiking.neuron.value, spiking.k,
        )  # fmt: skip
    elif spikes is None:
        logger.warning(
            "the exported model does not spike: training had not come to start_step (%d).",
            spiking.start_step,
        )
    else:
        logger.info(
            "the exported model spikes (%s, k = %g, blend = %g); spiking=None leaves that out",
            spiking.neuron.value, spikes.k, spikes.blend,
        )  # fmt: skip


if __name__ == "__main__":
    main()
