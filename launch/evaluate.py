"""`python -m launch.evaluate`: perplexity by position, needle recall, logits of a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from data.config import DataConfig
from data.loader import heldout_rows
from data.prepared import read_manifest
from launch.checkpoints import OpenedModel, full_spikes, open_model
from launch.compose import command
from launch.logits import write_logits
from models.config import NeuronKind, SpikingConfig
from models.spiking.recorder import METRICS, SpikeRecorder, metrics
from parallel.backend.detect import detect
from parallel.config import BackendName, Precision
from training.config import STRICT
from training.evaluate import Perplexity, PositionBuckets, model_losses, summed_losses
from training.needle import NeedleGrid, needle_recall
from training.stage_data import check_vocabulary, prepared_folders
from training.weights import check_same_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitsConfig:
    """Token ids to run (`.npy`, integers `[B, T]`) and where float32 logits `[B, T, V]` go."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    tokens: str | None = None
    out: str | None = None

    def __post_init__(self) -> None:
        if (self.tokens is None) != (self.out is None):
            raise ValueError("logits.tokens and logits.out must be set together, or both be null.")


@dataclass(frozen=True, kw_only=True, slots=True)
class NeedleConfig:
    """Prompt lengths (none: no needle test), depths 0 to 1, samples at each of them."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    lengths: list[int] = field(default_factory=list)
    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    samples: int = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """What to measure. `window_tokens` null is the model's own window; results go to `out`.

    With `logits.tokens`, perplexity is measured too only if `data.path` or `data.mixture` is set.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    checkpoint: str
    data: DataConfig = field(default_factory=DataConfig)
    rows: int = 64
    sequence_length: int = 1024
    window_tokens: int | None = None
    microbatch_rows: int = 4
    seed: int = 1
    spiking: SpikingConfig = field(default_factory=SpikingConfig)
    precision: Precision = Precision.fp32
    backend: BackendName = BackendName.auto
    logits: LogitsConfig = field(default_factory=LogitsConfig)
    needle: NeedleConfig = field(default_factory=NeedleConfig)
    out: str | None = None

    def __post_init__(self) -> None:
        for name in ("rows", "sequence_length", "microbatch_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1.")

    @property
    def needs_text(self) -> bool:
        """Whether held-out text is read."""
        has_data = self.data.path is not None or bool(self.data.mixture)
        return has_data or bool(self.needle.lengths) or self.logits.tokens is None


@command("evaluate", EvaluateConfig)
def main(config: EvaluateConfig) -> None:
    """Measure a checkpoint on held-out text, or write its logits; prints JSON.

    checkpoint= takes a run folder, a Synfire checkpoint or a Hugging Face folder. Perplexity is
    given over all tokens, by position in the document, and beyond the window.
    """
    result = evaluate(config)
    text = json.dumps(result, indent=1) + "\n"
    if config.out is not None:
        out = Path(config.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
        logger.info("wrote %s", out)
    sys.stdout.write(text)


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Everything `config` asks for, as JSON values.

    Raises:
        ValueError: a checkpoint, data or token file that cannot be used, naming why.
    """
    folders = list(prepared_folders(config.data)) if config.needs_text else []
    opened = open_model(
        config.checkpoint,
        precision=config.precision,
        spiking=config.spiking,
        backend=detect(config.backend),
    )
    result: dict[str, Any] = {
        "checkpoint": config.checkpoint,
        "pattern": opened.config.layers.describe(),
        "precision": config.precision.value,
        "spiking": config.spiking.neuron.value,
        "k": None if config.spiking.neuron is NeuronKind.off else config.spiking.k,
        "step": None if opened.manifest is None else opened.manifest.get("step"),
    }
    if config.logits.tokens is not None and config.logits.out is not None:
        shape = write_logits(
            opened, Path(config.logits.tokens), Path(config.logits.out), full_spikes(config.spiking)
        )
        result["logits"] = {"out": config.logits.out, "shape": list(shape)}
    if folders:
        _check_data(folders, opened, config)
        result.update(measure_perplexity(config, opened, folders))
    if config.needle.lengths:
        result["needle"] = list(measure_needle(config, opened, folders))
    return result


def measure_perplexity(
    config: EvaluateConfig, opened: OpenedModel, folders: list[Path]
) -> dict[str, Any]:
    """Token-weighted perplexity over all folders, with spike statistics when spiking."""
    window = config.window_tokens or opened.config.visible_window_tokens
    buckets = PositionBuckets(config.sequence_length, window)
    recorder = SpikeRecorder(config.spiking.statistics_tokens)
    losses = model_losses(opened.model, full_spikes(config.spiking, recorder))
    started = time.perf_counter()
    sums = {}
    for folder in folders:
        rows = heldout_rows(folder, sequence_length=config.sequence_length, rows=config.rows)
        sums[str(folder)] = summed_losses(
            rows, losses, buckets, microbatch_rows=config.microbatch_rows
        )
    seconds = time.perf_counter() - started
    total = Perplexity.from_sums(buckets, torch.stack(list(sums.values())).sum(dim=0))
    logger.info(
        "perplexity %.4f over %d tokens, %.0f tokens/s",
        total.perplexity, total.num_tokens, total.num_tokens / seconds,
    )  # fmt: skip
    return {
        "loss": total.loss,
        "perplexity": total.perplexity,
        "perplexity_beyond_window": total.beyond_window,
        "perplexity_by_position": total.by_position,
        "perplexity_by_folder": {
            name: Perplexity.from_sums(buckets, part).perplexity for name, part in sums.items()
        },
        "window_tokens": window,
        "sequence_length": config.sequence_length,
        "num_tokens": total.num_tokens,
        "tokens_per_second": total.num_tokens / seconds,
        "sparsity": overall_sparsity(recorder),
        "spikes": recorder.summary(),
    }


def overall_sparsity(recorder: SpikeRecorder) -> dict[str, float] | None:
    """Spike metrics over all sites together, each value counted once; None without spikes."""
    sites = recorder.tensors()
    if not sites:
        return None
    found = metrics(torch.stack(list(sites.values())).sum(dim=0).cpu())
    return {name: found[name] for name in METRICS}


def measure_needle(
    config: EvaluateConfig, opened: OpenedModel, folders: list[Path]
) -> Iterator[dict[str, Any]]:
    """One mapping a length and depth; the filler is the first folder's held-out text."""
    if opened.tokenizer is None:
        raise ValueError(
            f"needle.lengths ({config.needle.lengths}) must be empty for a checkpoint without a "
            f"tokenizer: got {config.checkpoint}. Copy its tokenizer files there."
        )
    grid = NeedleGrid(
        lengths=tuple(config.needle.lengths),
        depths=tuple(config.needle.depths),
        num_samples=config.needle.samples,
        seed=config.seed,
    )
    filler = heldout_rows(folders[0], sequence_length=max(grid.lengths), rows=grid.num_samples)
    scores = needle_recall(
        opened.model,
        filler.tokens.reshape(-1),
        opened.tokenizer,
        grid,
        spikes=full_spikes(config.spiking),
    )
    for score in scores:
        logger.info(
            "needle at length %d, depth %.2f: exact %.2f, log probability %.2f (%+.2f), rank %.1f",
            score.length, score.depth, score.exact_match, score.log_probability,
            score.log_probability_gain, score.rank,
        )  # fmt: skip
        yield dataclasses.asdict(score)


def _check_data(folders: list[Path], opened: OpenedModel, config: EvaluateConfig) -> None:
    """The text must be encoded with the checkpoint's own tokens."""
    for folder in folders:
        manifest = read_manifest(folder)
        check_vocabulary(folder, manifest.vocab_size, opened.config.vocab_size)
        sha256 = None if opened.tokenizer is None else opened.tokenizer.sha256
        check_same_tokenizer(config.checkpoint, sha256, manifest.tokenizer_sha256)


if __name__ == "__main__":
    main()
