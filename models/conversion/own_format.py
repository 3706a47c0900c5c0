"""Our own Hugging Face format, which holds every model: our config's keys and our source files.

The source files are the package `models.exported`, which no other code imports: transformers runs
the copies beside the weights (`trust_remote_code`), where there is no Synfire.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from models.config import ModelConfig, NeuronKind, SpikingConfig
from models.conversion.config_keys import ConfigKeys, Format
from models.layer_pattern import compress
from models.spiking.neurons import Spikes

SOURCE = Path(__file__).parent.parent / "exported"
SOURCE_FILES = (
    "configuration_synfire.py", "experts_synfire.py", "kernels_synfire.py", "layers_synfire.py",
    "modeling_synfire.py",
)  # fmt: skip
AUTO_MAP = {
    "AutoConfig": "configuration_synfire.SynfireConfig",
    "AutoModelForCausalLM": "modeling_synfire.SynfireForCausalLM",
}
_FIELDS = tuple(
    field.name for field in dataclasses.fields(ModelConfig) if field.name not in ("mixers", "ffns")
)
"""Keys that have the same name in config.json; patterns are lists there, one symbol a layer."""


def own_keys(
    config: ModelConfig, spiking: SpikingConfig | None, spikes: Spikes | None
) -> dict[str, Any]:
    """The keys of config.json that are this format's own, and where its classes are."""
    layers = config.layers
    applied = None
    if spiking is not None and spikes is not None:
        applied = {"k": spikes.k, "blend": spikes.blend, "max_count": spiking.max_count}
    return {
        "auto_map": AUTO_MAP,
        "num_hidden_layers": config.num_hidden_layers,
        "layer_mixers": [
            "+".join(kind.value for kind in mixers) or "_" for mixers in layers.mixers
        ],
        "layer_ffns": [ffn.value for ffn in layers.ffns],
        **{name: _plain(getattr(config, name)) for name in _FIELDS},
        "spiking": applied,
    }


def read_own(raw: Mapping[str, Any]) -> ModelConfig:
    """The model that a config.json of this format describes.

    Raises:
        ValueError: a key or value that we would not honour, by name.
    """
    keys = ConfigKeys(raw, Format.synfire)
    values = {name: keys.take(name) for name in _FIELDS}
    for name, ours in (("layer_mixers", "mixers"), ("layer_ffns", "ffns")):
        symbols = keys.take(name)
        if not isinstance(symbols, list) or not all(isinstance(each, str) for each in symbols):
            keys.refuse(name, "must be a list with one symbol a layer")
        values[ours] = compress(symbols)
    keys.only("num_hidden_layers", (len(raw["layer_mixers"]),))
    read_spikes(raw)
    keys.take("spiking")
    keys.refuse_the_rest()
    given = {name: value for name, value in values.items() if value is not None}
    try:
        return TypeAdapter(ModelConfig).validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(("config.json", *map(str, first["loc"])))
        raise ValueError(f"{place}: {first['msg']}. Synfire would not honour it.") from error


def read_spikes(raw: Mapping[str, Any]) -> tuple[SpikingConfig, Spikes] | None:
    """How a model of this format spikes; None for continuous activations and other formats.

    Raises:
        ValueError: a key that we would not honour.
    """
    given = raw.get("spiking")
    if raw.get("model_type") != Format.synfire.value or given is None:
        return None
    if not isinstance(given, Mapping) or given.keys() != {"k", "blend", "max_count"}:
        raise ValueError(
            f"config.json spiking ({given}) must be null or have k, blend and max_count."
        )
    config = SpikingConfig(neuron=NeuronKind.adaptive, k=given["k"], max_count=given["max_count"])
    return config, Spikes(k=config.k, blend=given["blend"])


def copy_source(folder: Path) -> None:
    """Put the model's source files into a folder."""
    for name in SOURCE_FILES:
        shutil.copyfile(SOURCE / name, folder / name)


def _plain(value: Any) -> Any:
    """As JSON has it."""
    if dataclasses.is_dataclass(value):
        names = (field.name for field in dataclasses.fields(value))
        return {name: _plain(getattr(value, name)) for name in names}
    return value.value if isinstance(value, Enum) else value
