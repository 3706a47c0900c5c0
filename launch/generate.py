"""`python -m launch.generate`: text from a checkpoint, with decoding states of constant size."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from launch.checkpoints import full_spikes, open_model
from launch.compose import command
from models.config import SpikingConfig
from models.generation import generate
from parallel.backend.detect import detect
from parallel.config import BackendName, Precision
from training.config import STRICT

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig:
    """What to continue, how long, and how to choose tokens (temperature 0: the likeliest)."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    checkpoint: str
    prompt: str = ""
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 1
    stop_at_eos: bool = True
    spiking: SpikingConfig = field(default_factory=SpikingConfig)
    precision: Precision = Precision.fp32
    backend: BackendName = BackendName.auto

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens ({self.max_new_tokens}) must be at least 1.")


@command("generate", GenerateConfig)
def main(config: GenerateConfig) -> None:
    """Continue a prompt and print the text, then the speed.

    The prompt is read in chunks; L layers remember a matrix of constant size, S layers one window.
    """
    text, num_new, seconds = continue_text(config)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
    logger.info("%d new tokens, %.1f tokens/s", num_new, num_new / seconds)


def continue_text(config: GenerateConfig) -> tuple[str, int, float]:
    """The prompt with its continuation, the number of new tokens, and the seconds they took.

    Raises:
        ValueError: a checkpoint without a tokenizer, or sampling options out of range.
    """
    backend = detect(config.backend)
    opened = open_model(
        config.checkpoint, precision=config.precision, spiking=config.spiking, backend=backend
    )
    if opened.tokenizer is None:
        raise ValueError(
            f"checkpoint ({config.checkpoint}) must hold a tokenizer to read the prompt: got none. "
            "Copy the tokenizer's files into its tokenizer/ folder."
        )
    eos = opened.tokenizer.eos_token_id
    prompt = opened.tokenizer.encode(config.prompt) or [eos]
    tokens = torch.tensor([prompt], dtype=torch.int64, device=opened.device)
    started = time.perf_counter()
    out = generate(
        opened.model,
        tokens,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
        eos_token_id=eos if config.stop_at_eos else None,
        spikes=full_spikes(config.spiking),
    )
    new = out[0, len(prompt) :].tolist()
    seconds = time.perf_counter() - started
    return config.prompt + opened.tokenizer.decode(new), len(new), seconds


if __name__ == "__main__":
    main()
