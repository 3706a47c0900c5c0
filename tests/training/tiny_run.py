"""A prepared corpus and a run of a few small steps, in one place for the tests of this folder."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from data.prepare_corpus import prepare
from parallel.boxes import Box
from parallel.checkpoint import load, newest_complete, tensor_dtypes, tensor_shapes
from training.config import RunConfig
from training.metrics import read_rows

VOCAB_SIZE = 300
TIME_FIELDS = ("tokens_per_second", "mfu", "mfu_6n", "memory_bytes", "checkpoint/stall_seconds")


def write_corpus(folder: Path, *, seed: int = 0, files: int = 24) -> Path:
    """A folder of short made-up programs."""
    folder.mkdir(parents=True)
    generator = random.Random(seed)
    words = ["alpha", "beta", "gamma", "delta", "value", "total", "index", "items"]
    for number in range(files):
        lines = []
        for _ in range(generator.randrange(4, 14)):
            left, right, other = generator.choices(words, k=3)
            lines.append(f"def {left}_{right}({other}):\n    return {other} + {number}\n")
        (folder / f"part_{number:02d}.py").write_text("\n".join(lines))
    return folder


def prepare_data(folder: Path, *, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> Path:
    """A prepared folder with a small tokenizer, train and held-out text."""
    source = write_corpus(folder / "text", seed=seed)
    prepare(str(source), folder / "data", vocab_size=vocab_size, heldout_fraction=0.2)
    return folder / "data"


def tiny_run(prepared: Path, run_dir: Path, /, **changes: Any) -> RunConfig:
    """Six steps of a two-layer hybrid; `changes` are merged into the config's mapping."""
    mapping: dict[str, Any] = {
        "experiment": "tiny",
        "run_dir": str(run_dir),
        "seed": 3,
        "backend": "cpu",
        "model": {
            "vocab_size": VOCAB_SIZE, "hidden_size": 16, "intermediate_size": 24,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
            "mixers": "L S", "ffns": "d*2", "window_tokens": 8, "qkv_bias": True,
        },
        "stages": {
            "short": {"sequence_length": 16, "steps": 3, "global_batch_tokens": 64, "lr": 1e-2},
            "long": {"sequence_length": 32, "steps": 3, "global_batch_tokens": 128, "lr": 5e-3},
        },
        "data": {"path": str(prepared)},
        "spiking": {
            "neuron": "adaptive", "start_step": 2, "k_start": 6.0, "anneal_steps": 2,
            "statistics_interval_steps": 2,
        },
        "schedule": {"warmup_steps": 1},
        "training": {"precision": "fp32", "microbatch_rows": 2},
        "checkpoint": {"interval_steps": 2},
        "logging": {"wandb": "disabled", "interval_steps": 1},
    }  # fmt: skip
    return TypeAdapter(RunConfig).validate_python(merge(mapping, changes))


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Changes over base, mapping by mapping; a `stages` change replaces all stages."""
    merged = dict(base)
    for key, value in changes.items():
        is_inner = isinstance(value, dict) and key != "stages" and isinstance(base.get(key), dict)
        merged[key] = merge(base[key], value) if is_inner else value
    return merged


def rows_of(run_dir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Rows without what depends on the clock."""
    return [
        {key: value for key, value in row.items() if key not in TIME_FIELDS}
        for row in read_rows(run_dir / name)
    ]


def saved_tensors(run_dir: Path) -> dict[str, Tensor]:
    """Everything in the newest checkpoint."""
    newest = newest_complete(run_dir)
    assert newest is not None
    dtypes = tensor_dtypes(newest)
    tensors = {
        name: torch.empty(shape, dtype=dtypes[name])
        for name, shape in tensor_shapes(newest).items()
    }
    load(newest, {name: Box.whole(tensor) for name, tensor in tensors.items()}, is_verified=True)
    return tensors


def assert_same_run(found: Path, expected: Path) -> None:
    """Two run folders have bit-equal rows, weights, optimizer state and sample streams."""
    assert rows_of(found) == rows_of(expected)
    assert rows_of(found, "eval.jsonl") == rows_of(expected, "eval.jsonl")
    left, right = saved_tensors(found), saved_tensors(expected)
    assert left.keys() == right.keys()
    for name, tensor in right.items():
        assert torch.equal(left[name], tensor), name
    for key in ("step", "tokens", "sample_hash", "num_updates", "stage", "stage_step"):
        assert manifest_of(found)[key] == manifest_of(expected)[key], key


def manifest_of(run_dir: Path) -> dict[str, Any]:
    """Manifest of the newest checkpoint."""
    newest = newest_complete(run_dir)
    assert newest is not None
    manifest: dict[str, Any] = json.loads((newest / "manifest.json").read_text())
    return manifest


def with_run_dir(config: RunConfig, run_dir: Path) -> RunConfig:
    """The same run elsewhere."""
    return dataclasses.replace(config, run_dir=str(run_dir))
