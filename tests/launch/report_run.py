"""A small made-up run folder with every file that a report reads."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

SITES = ("mixer_in", "mixer_out", "ffn_in", "ffn_out")


def write_run(run_dir: Path, *, steps: int = 50) -> Path:
    """Write the whole folder; spike statistics at steps 30 and 50, 1.5 mean spikes over layers."""
    run_dir.mkdir(parents=True, exist_ok=True)
    rows = [metrics_row(step) for step in range(1, steps + 1)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held = [{"step": 20, "loss": 3.0, "perplexity": 20.1}, {"step": 50, "loss": 2.5,
            "perplexity": 12.25}]  # fmt: skip
    (run_dir / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    (run_dir / "config.yaml").write_text(CONFIG)
    (run_dir / "summary.json").write_text(json.dumps(SUMMARY))
    (run_dir / "certificate.json").write_text(json.dumps(certificate()))
    write_raster(run_dir / "spike_raster.npz")
    return run_dir


def metrics_row(step: int) -> dict[str, Any]:
    row: dict[str, Any] = {
        "step": step, "tokens": step * 1000, "loss": 2.0 + 4.0 * math.exp(-step / 9),
        "grad_norm": 1.0, "lr": 1e-3, "tokens_per_second": 3000.0 + step, "mfu": None,
        "mfu_6n": None, "memory_bytes": 1, "sample_hash": "00", "stage": "main",
    }  # fmt: skip
    if step in (30, 50):
        for layer in range(2):
            for site in SITES:
                place = f"spike/{layer}/{site}"
                row |= {
                    f"{place}/mean_count": 3.0, f"{place}/mean_spikes": 1.0 + layer,
                    f"{place}/firing_rate": (1.0 + layer) / 9, f"{place}/silent_share": 0.1,
                    f"{place}/window_sparsity": 0.7, f"{place}/share_le_7": 0.95,
                    f"{place}/clipped_share": 0.0,
                }  # fmt: skip
    return row


def write_raster(path: Path, tokens: tuple[str, ...] = ("def", " read", "\n")) -> None:
    counts = np.arange(len(tokens) * 64).reshape(len(tokens), 64) % 11 - 5
    np.savez(path, tokens=np.array(tokens), counts=counts, site=np.array("1/ffn_in"))


def certificate() -> dict[str, Any]:
    linear = {
        "layer": 0, "key_bias_norm": 7.25, "key_projection_norm": 3.5, "dead_key_channels": 0.125,
        "half_life_tokens": {"edges": [1.0, 10.0, 100.0], "share": [0.1, 0.6, 0.2, 0.1]},
    }  # fmt: skip
    layers = [
        {"layer": 0, "source": "F", "target": "L", "relative_error": 0.4, "cosine": 0.9},
        {"layer": 1, "source": "F", "target": "S", "relative_error": 0.5, "cosine": 0.9},
    ]
    return {
        "source": {"format": "qwen2", "pattern": "mixers F*2 | ffns d*2", "unused_tensors": []},
        "target": {"pattern": "mixers L S | ffns d*2"},
        "origins": {"copied": 23, "reshaped": 0, "scaled": 0, "new": 4},
        "unexplained_tensors": [],
        "alignment": [{"layer": 0, "tokens": 512, "before": 0.875, "after": 0.375, "kept": True}],
        "numeric": {
            "skipped": False, "tokens": 1024, "layers": layers, "logit_kl": 0.512,
            "perplexity": {"source": 12.34, "target": 43.21}, "linear_layers": [linear],
        },
    }  # fmt: skip


SUMMARY = {
    "perplexity": {
        "base": 12.0, "control": 10.0, "scratch": 18.0, "converted": 30.0, "continued": 10.5,
        "spiked": 10.55,
    },
    "perplexity_beyond_window": {
        "base": 11.0, "control": 9.0, "scratch": 17.0, "converted": None, "continued": 9.9,
        "spiked": 9.95,
    },
    "sparsity": {"window_sparsity": 0.6925},
    "tokens_per_second": 3000.0,
    "seconds": {"prepare": 11.25, "total": 488.0},
}  # fmt: skip

CONFIG = """
experiment: tiny
seed: 7
model:
  {vocab_size: 64, hidden_size: 16, intermediate_size: 32, num_attention_heads: 4,
   num_key_value_heads: 2, head_dim: 4, mixers: L S, ffns: d*2, window_tokens: 8}
stages: {main: {sequence_length: 100, steps: 50, global_batch_tokens: 1000, lr: 0.001}}
spiking: {neuron: adaptive, k: 3.0, start_step: 29}
"""
