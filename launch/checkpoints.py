"""Any checkpoint as a model in one process: run folder, Synfire checkpoint or Hugging Face folder.

Loads weights tensor by tensor into a model that was built without memory, so the peak is the model
and one tensor.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter

from data.tokenizer import Tokenizer, load_tokenizer
from models.config import ModelConfig, NeuronKind, SpikingConfig
from models.conversion.huggingface import CONFIG, read_json
from models.conversion.own_format import read_spikes
from models.model import Model
from models.spiking.neurons import Spikes
from models.spiking.recorder import SpikeRecorder
from parallel.backend.base import Backend
from parallel.backend.detect import detect
from parallel.config import Precision
from training.engine_setup import DTYPES
from training.optimizer import decays
from training.weight_source import WeightSource, open_weights

logger = logging.getLogger(__name__)


class OpenedModel(NamedTuple):
    """A model with weights on its device, and what lies beside them.

    `tokenizer` is None when the checkpoint has none; `manifest` is None for a Hugging Face folder.
    """

    model: Model
    config: ModelConfig
    tokenizer: Tokenizer | None
    manifest: Mapping[str, Any] | None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device


def open_model(
    path: str | Path,
    *,
    precision: Precision = Precision.fp32,
    spiking: SpikingConfig | None = None,
    backend: Backend | None = None,
) -> OpenedModel:
    """Build a checkpoint's model, fill every parameter and open its tokenizer.

    Args:
        path: a run folder (its newest complete checkpoint), one checkpoint or a Hugging Face
            folder.
        precision: dtype of the weights; with bf16, norms, gates and biases stay float32.
        spiking: neuron at the inputs of projections, none by default.
        backend: device and kernels, the machine's by default.

    Raises:
        ValueError: no checkpoint there, or tensors that are not exactly the model's.
        CheckpointError: a damaged checkpoint.
    """
    source = open_weights(path)
    backend = backend or detect()
    _note_spiking(source, spiking)
    with torch.device("meta"):
        model = Model(source.model, spiking=spiking, kernels=backend.kernels())
    for name, parameter in model.named_parameters():
        dtype = DTYPES[precision] if decays(name) or precision is Precision.fp64 else torch.float32
        parameter.data = torch.empty_like(parameter, dtype=dtype)
    model.to_empty(device=backend.device(0))
    fill(model, source)
    tokenizer = None
    if source.tokenizer_folder is not None and source.tokenizer_sha256 is not None:
        tokenizer = load_tokenizer(source.tokenizer_folder)
    return OpenedModel(model.eval().requires_grad_(False), source.model, tokenizer, source.manifest)


@torch.no_grad()
def fill(model: Model, source: WeightSource) -> None:
    """Copy every parameter from the source; both must hold exactly the same names.

    Raises:
        ValueError: the first name that only one of them has, or a shape with both numbers.
    """
    parameters = dict(model.named_parameters())
    for name in sorted(parameters.keys() ^ source.shapes.keys()):
        where = "the checkpoint" if name in source.shapes else "the model"
        raise ValueError(
            f"{source.path} must hold exactly its model's parameters: {name} is only in {where}. "
            "Convert or save the checkpoint again."
        )
    for name, tensor in source.read(list(parameters)):
        if tensor.shape != parameters[name].shape:
            raise ValueError(
                f"{name} {tuple(tensor.shape)} of {source.path} must have the model's shape: got "
                f"{tuple(parameters[name].shape)}. Convert or save the checkpoint again."
            )
        parameters[name].copy_(tensor)


def full_spikes(config: SpikingConfig, recorder: SpikeRecorder | None = None) -> Spikes | None:
    """Spiking after its whole schedule, or None when it is off."""
    if config.neuron is NeuronKind.off:
        return None
    return Spikes(k=config.k, blend=1.0, recorder=recorder)


def _trained_spiking(source: WeightSource) -> SpikingConfig | None:
    """As its manifest, or the config.json of our own Hugging Face format, says."""
    if source.manifest is None:
        own = read_spikes(read_json(source.path / CONFIG))
        return None if own is None else own[0]
    saved = source.manifest.get("spiking")
    return None if saved is None else TypeAdapter(SpikingConfig).validate_python(saved)


def _note_spiking(source: WeightSource, spiking: SpikingConfig | None) -> None:
    """Say so when a model runs with another neuron than it was trained with."""
    trained = _trained_spiking(source)
    if trained is None or trained.neuron is NeuronKind.off:
        return
    here = spiking or SpikingConfig()
    overrides = [f"spiking={trained.neuron.value}"] if here.neuron is not trained.neuron else []
    overrides += [
        f"spiking.{key}={'null' if getattr(trained, key) is None else getattr(trained, key)}"
        for key in ("k", "max_count")
        if getattr(here, key) != getattr(trained, key)
    ]
    if overrides and here.neuron is NeuronKind.off:
        logger.info(
            "%s was trained with spiking and runs without it; add %s to spike",
            source.path, " ".join(overrides),
        )  # fmt: skip
    elif overrides:
        logger.warning(
            "%s was trained with another neuron than it runs with; add %s for its own",
            source.path, " ".join(overrides),
        )  # fmt: skip
