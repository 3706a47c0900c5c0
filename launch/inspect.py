"""`python -m launch.inspect`: what is in a checkpoint, a run folder or a Hugging Face folder."""  # noqa: A005 - the command's fixed name; always imported as launch.inspect

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import TypeAdapter

from launch.compose import command
from models.config import ModelConfig, SpikingConfig
from models.conversion.convert import plan_conversion
from models.conversion.huggingface import SafetensorsFolder
from models.conversion.source_config import read_format
from models.cost import new_parameter_count, parameter_count
from models.strict import STRICT
from parallel.checkpoint import read_manifest, tensor_dtypes, tensor_shapes
from training.resolved_config import changes, read_config
from training.weight_source import MODEL, WeightSource, open_weights

CERTIFICATE = "certificate.json"
RUN_CONFIG = "config.yaml"
_MODEL_KEYS = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "window_tokens", "tie_word_embeddings",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectConfig:
    """What to look at. `against` names a second one whose settings are compared."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    checkpoint: str
    against: str | None = None
    verify: bool = True


@command("inspect", InspectConfig)
def main(config: InspectConfig) -> None:
    """Print what is in a run folder, a checkpoint or a Hugging Face folder.

    Names, sizes, progress, hashes, tokenizer, certificate; against=DIR lists differing settings.
    """
    sys.stdout.write(report(config))


def report(config: InspectConfig) -> str:
    """The printed text.

    Raises:
        ValueError: nothing that can be read at `checkpoint` or `against`.
        CheckpointError: a damaged checkpoint.
    """
    facts = describe(Path(config.checkpoint), is_verified=config.verify)
    width = max(len(key) for key in facts)
    lines = [f"{key:<{width}}  {value}" for key, value in facts.items()]
    if config.against is not None:
        changes = differences(Path(config.checkpoint), Path(config.against))
        lines += ["", f"{len(changes)} settings differ from {config.against} (here -> there)"]
        lines += [f"{key}  {here} -> {there}" for key, here, there in changes]
    return "\n".join(lines) + "\n"


def describe(path: Path, *, is_verified: bool = True) -> dict[str, Any]:
    """Readable facts by name, in the order in which they are printed."""
    source = open_weights(path, check_files=is_verified)
    model = source.model
    facts: dict[str, Any] = {"path": path}
    if source.path != path:
        steps = sorted(folder.name for folder in (path / "checkpoints").glob("step_*"))
        facts |= {"kind": "run folder", "checkpoints": ", ".join(steps), "newest": source.path.name}
    else:
        facts["kind"] = "Hugging Face folder" if source.manifest is None else "Synfire checkpoint"
    facts["pattern"] = model.layers.describe()
    facts |= {key: getattr(model, key) for key in _MODEL_KEYS}
    facts["parameters"] = f"{parameter_count(model):,} ({new_parameter_count(model):,} new)"
    if source.manifest is None:
        facts |= _hugging_face(source)
    else:
        facts |= _synfire(source, is_verified=is_verified)
    facts["tokenizer"] = "none"
    if source.tokenizer_sha256 is not None:
        facts["tokenizer"] = f"{source.tokenizer_folder} (sha256 {source.tokenizer_sha256[:12]})"
    return facts


def differences(here: Path, there: Path) -> list[tuple[str, Any, Any]]:
    """Settings that differ: run configs when both are run folders, else models and spiking."""
    if all((folder / RUN_CONFIG).is_file() for folder in (here, there)):
        before, after = (read_config(folder / RUN_CONFIG) for folder in (here, there))
    else:
        before, after = (
            _settings(open_weights(folder, check_files=False)) for folder in (here, there)
        )
    return list(changes(before, after))


def _hugging_face(source: WeightSource) -> dict[str, Any]:
    folder = SafetensorsFolder(source.path)
    plan = plan_conversion(folder, source.model)
    return {
        "format": read_format(folder.config).value,
        "tensors": _tensors({t.name: t.shape for t in plan}, {t.name: t.dtype for t in plan}),
    }


def _synfire(source: WeightSource, *, is_verified: bool) -> dict[str, Any]:
    manifest = read_manifest(source.path)
    shapes, dtypes = tensor_shapes(source.path), tensor_dtypes(source.path)
    weights = {name: shape for name, shape in shapes.items() if name.startswith(MODEL)}
    optimizer = {name: shape for name, shape in shapes.items() if name not in weights}
    facts: dict[str, Any] = {
        "step": manifest.get("step"),
        "stage": manifest.get("stage"),
        "tokens": manifest.get("tokens"),
        "spiking": (manifest.get("spiking") or {}).get("neuron"),
        "tensors": _tensors(weights, dtypes),
        "optimizer": _tensors(optimizer, dtypes) if optimizer else "none",
        "files": f"{len(manifest['files'])}, {'sha256' if is_verified else 'not'} verified",
    }
    if (source.path / CERTIFICATE).is_file():
        facts["certificate"] = _certificate(source.path / CERTIFICATE)
    return facts


def _tensors(shapes: dict[str, tuple[int, ...]], dtypes: dict[str, torch.dtype]) -> str:
    """Count, bytes and dtypes in one line."""
    sizes = {name: math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()}
    kinds = Counter(str(dtypes[name]).removeprefix("torch.") for name in shapes)
    words = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return f"{len(shapes)}, {sum(sizes.values()):,} bytes ({words})"


def _certificate(path: Path) -> str:
    found = json.loads(path.read_text(encoding="utf-8"))
    origins = ", ".join(f"{count} {kind}" for kind, count in found["origins"].items() if count)
    text = f"{origins}; {len(found['unexplained_tensors'])} unexplained"
    if found["numeric"]["skipped"]:
        return f"{text}; numeric part skipped"
    perplexity = found["numeric"]["perplexity"]
    return (
        f"{text}; perplexity {perplexity['source']:.4g} -> {perplexity['target']:.4g}, "
        f"logit KL {found['numeric']['logit_kl']:.3g}"
    )


def _settings(source: WeightSource) -> dict[str, Any]:
    model = TypeAdapter(ModelConfig).dump_python(source.model, mode="json")
    none = TypeAdapter(SpikingConfig).dump_python(SpikingConfig(), mode="json")
    return {"model": model, "spiking": (source.manifest or {}).get("spiking") or none}


if __name__ == "__main__":
    main()
