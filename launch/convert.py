"""`python -m launch.convert`: a Hugging Face folder to a Synfire checkpoint with a certificate."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from data.tokenizer import JSON_FILE, MODEL_FILE, Tokenizer, load_tokenizer
from launch.compose import command
from launch.convert_config import ConvertConfig
from launch.model_source import model_from_source, open_source
from launch.sample_text import SampleSizes, SampleText, read_sample
from models.config import ModelConfig, SpikingConfig
from models.conversion.attention_transfer import (
    AlignmentOptions,
    Fitted,
    check_key_bias,
    fit_new_parameters,
)
from models.conversion.certificate import build_certificate, compare_numerically
from models.conversion.convert import plan_conversion
from models.conversion.expert_scales import measure_scales
from models.conversion.huggingface import SafetensorsFolder, copy_tokenizer, write_json
from models.conversion.new_parameters import KeyBias, NormInit, UpcycleMode
from models.conversion.own_format import read_spikes
from models.conversion.source_checks import becomes_new, upcycled, warn_of_changes
from models.conversion.source_config import read_config, read_format
from models.conversion.target_tensor import TargetTensor
from models.expert_config import RouterScore
from models.layer_pattern import LayerPattern
from models.layouts import is_new_parameter
from models.mixer_config import GateKind
from parallel.boxes import LazyTensor
from parallel.checkpoint import CheckpointError, read_manifest, save_streamed

logger = logging.getLogger(__name__)

CERTIFICATE = "certificate.json"


@command("convert", ConvertConfig, resolve=model_from_source)
def main(config: ConvertConfig) -> None:
    """Convert a Hugging Face folder to a Synfire checkpoint with a certificate.

    source=DIR out=DIR imports a model as it is; model=NAME or mixers='[L S]*n' window_tokens=W
    or ffns='[d e]*n' make it another architecture. Streams tensor by tensor. For other options of a
    model of the source's sizes: model=from_checkpoint model.moe.num_experts=8.
    """
    convert(config)


def convert(config: ConvertConfig) -> dict[str, Any]:
    """Convert; returns the certificate.

    Raises:
        ValueError: a source or target that does not fit, before anything large is read.
        CheckpointError: the checkpoint could not be written.
    """
    refuse_occupied(Path(config.out))
    source = open_source(config.source)
    base = read_config(source.config)
    target = target_model(config, base)
    check_key_bias(target, config.options)
    plan_conversion(source, target, config.options)  # refuses what does not fit, reads nothing
    warn_of_changes(base, target)
    warn_of_new_parts(config, base, target)
    tokenizer = find_tokenizer(source.path)
    text = _sample(config, tokenizer)
    fitted = _fit(config, source, target, text)
    scales = _measure(config, source, target, text, fitted)
    plan = plan_conversion(source, target, config.options, fitted=fitted.values, scales=scales)
    numeric = None
    if text is not None and config.certificate.numeric:
        numeric = compare_numerically(source, target, plan, text.evaluation, progress=_report)
    certificate = build_certificate(
        source, target, config.options, plan, alignment=fitted.alignment, numeric=numeric
    )
    _write(config, source, target, plan, certificate, tokenizer)
    _log(config, certificate)
    return certificate


def target_model(config: ConvertConfig, base: ModelConfig) -> ModelConfig:
    """The model to convert to: named, or the source's own, with the pattern changed."""
    target = base if config.model is None else config.model
    changes: dict[str, Any] = {}
    if config.mixers is not None:
        # Another depth is refused later, with both numbers.
        layers = len(LayerPattern.parse_mixers(config.mixers))
        changes["ffns"] = target.ffns if layers == target.num_hidden_layers else f"d*{layers}"
    for name in ("mixers", "ffns", "window_tokens", "window_includes_self"):
        if getattr(config, name) is not None:
            changes[name] = getattr(config, name)
    for name in ("bos_token_id", "eos_token_id"):
        if getattr(target, name) is None:
            changes[name] = getattr(base, name)
    return dataclasses.replace(target, **changes)


def warn_of_new_parts(config: ConvertConfig, base: ModelConfig, target: ModelConfig) -> None:
    """Name options that the kind of gate or router makes idle or coarse."""
    if config.gate_init != "zero" and target.linear.gate is GateKind.key_tied:
        logger.warning(
            "gate_init (%s) has no effect with linear.gate key_tied. Set model.linear.gate_offset.",
            config.gate_init,
        )
    is_softmax = target.moe.score is RouterScore.softmax and not target.moe.renormalise
    is_paper = config.upcycle.mode is UpcycleMode.paper
    if is_paper and not is_softmax and upcycled(base, target):
        logger.warning(
            "upcycle.mode (paper) expects weights of 1 / num_experts, which this router does not "
            "give: outputs start far from the dense FFN's. Use exact or measured."
        )


def refuse_occupied(out: Path) -> None:
    """Refuse, before the work, an `out` that could not be written after it.

    Raises:
        ValueError: `out` holds something that is not a checkpoint.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        read_manifest(out)
    except CheckpointError as error:
        raise ValueError(
            f"out ({out}) must be new, empty or an older checkpoint: it is neither. "
            "Name another folder."
        ) from error


def find_tokenizer(folder: Path) -> Tokenizer | None:
    """The folder's tokenizer; None, with a warning, when there is none that can be read."""
    if not any((folder / name).is_file() for name in (JSON_FILE, MODEL_FILE)):
        logger.warning("%s has no %s or %s: no tokenizer.", folder, JSON_FILE, MODEL_FILE)
        return None
    try:
        return load_tokenizer(folder)
    except ValueError as error:
        logger.warning("%s", error)
        return None


def _sample(config: ConvertConfig, tokenizer: Tokenizer | None) -> SampleText | None:
    if config.text is None:
        return None
    sizes = SampleSizes(config.sequence_length, config.text_tokens, config.align.tokens)
    return read_sample(Path(config.text), sizes, tokenizer=tokenizer, seed=config.seed)


def _fit(
    config: ConvertConfig,
    source: SafetensorsFolder,
    target: ModelConfig,
    text: SampleText | None,
) -> Fitted:
    """What sample text decides; warns about what stays undecided without it."""
    if not any(becomes_new(read_config(source.config), target)):
        for key, is_given in given_for_new_layers(config).items():
            if is_given:
                logger.warning(
                    "%s has no effect: no layer becomes L or X+Y. Set mixers= or model=.", key
                )
        return Fitted()
    if text is None:
        if config.norm_init is NormInit.calibrated:
            logger.warning(
                "norm_init (calibrated) has no effect without sample text: new norms start at "
                "ones, and step 0 is far worse. Set text=DIR."
            )
        return Fitted()
    alignment = None
    if text.alignment is not None:
        how = AlignmentOptions(
            learning_rate=config.align.learning_rate,
            rows_per_step=config.align.rows_per_step,
            epochs=config.align.epochs,
        )
        alignment = (how, text.alignment)
    return fit_new_parameters(
        source, target, config.options, text.calibration, alignment=alignment, progress=_report
    )


def _measure(
    config: ConvertConfig,
    source: SafetensorsFolder,
    target: ModelConfig,
    text: SampleText | None,
    fitted: Fitted,
) -> dict[int, float]:
    """Factors of upcycled layers, where they are measured; warns where nothing is upcycled."""
    is_measured = config.upcycle.mode is UpcycleMode.measured
    if not upcycled(read_config(source.config), target):
        if config.upcycle.mode is not UpcycleMode.exact:
            logger.warning("upcycle has no effect: no layer becomes e. Set ffns= or model=.")
        return {}
    if text is None or not is_measured:
        return {}
    return measure_scales(
        source, target, config.options, text.calibration, fitted=fitted.values, progress=_report
    )


def given_for_new_layers(config: ConvertConfig) -> dict[str, bool]:
    """Keys that only layers which become `L` read, and whether they are off their defaults."""
    return {
        "align.tokens": config.align.tokens > 0,
        "gate_init": config.gate_init != "zero",
        "norm_init": config.norm_init is not NormInit.calibrated,
        "linear.key_bias": config.linear.key_bias is not KeyBias.keep,
    }


def _write(  # noqa: PLR0913 - everything that a checkpoint consists of
    config: ConvertConfig,
    source: SafetensorsFolder,
    target: ModelConfig,
    plan: list[TargetTensor],
    certificate: dict[str, Any],
    tokenizer: Tokenizer | None,
) -> None:
    """Stream the checkpoint, with tokenizer and certificate beside the tensors."""

    def add_files(folder: Path) -> None:
        copy_tokenizer(source.path, folder / "tokenizer")
        write_json(folder / CERTIFICATE, certificate)

    facts = None
    if tokenizer is not None:
        facts = {
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "eos_token_id": tokenizer.eos_token_id,
        }
    spiking, _ = read_spikes(source.config) or (SpikingConfig(), None)
    manifest = {
        "model": TypeAdapter(ModelConfig).dump_python(target, mode="json"),
        "pattern": target.layers.describe(),
        "spiking": TypeAdapter(SpikingConfig).dump_python(spiking, mode="json"),
        "step": 0,
        "stage": None,
        "stage_step": 0,
        "tokens": 0,
        "seed": config.seed,
        "tokenizer": facts,
        "new_parameters": [tensor.name for tensor in plan if is_new_parameter(tensor.name)],
        "source": {"path": str(source.path), "format": read_format(source.config).value},
        "versions": {"torch": torch.__version__},
    }
    lazy = [
        LazyTensor(f"model/{t.name}", t.shape, t.dtype, t.load_part, t.copies.count, t.copies.dim)
        for t in plan
    ]
    save_streamed(Path(config.out), lazy, manifest, add_files=add_files)


def _report(what: str, done: int, total: int) -> None:
    logger.info("%s layer %d/%d", what, done, total)


def _log(config: ConvertConfig, certificate: dict[str, Any]) -> None:
    origins = ", ".join(
        f"{count} {kind}" for kind, count in certificate["origins"].items() if count
    )
    unused = certificate["source"]["unused_tensors"]
    logger.info("wrote %s: %s, %d unused source tensors", config.out, origins, len(unused))
    numeric = certificate["numeric"]
    if numeric["skipped"]:
        logger.info("the numeric part of the certificate was skipped")
    else:
        logger.info(
            "perplexity %s, logit KL %.4g nats", json.dumps(numeric["perplexity"]),
            numeric["logit_kl"],
        )  # fmt: skip
        for layer in numeric["expert_layers"]:
            logger.info(
                "layer %d: experts put out %.4f of the dense FFN (%.4f to %.4f)",
                layer["layer"], layer["output_ratio_mean"], layer["output_ratio_min"],
                layer["output_ratio_max"],
            )  # fmt: skip


if __name__ == "__main__":
    main()
