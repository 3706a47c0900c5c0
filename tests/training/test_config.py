"""Rules of a run's config that its values break alone, before anything is composed or loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.training.tiny_run import tiny_run
from training.config import (
    CheckpointConfig,
    DistillConfig,
    EvaluationConfig,
    LoggingConfig,
    OptimizerConfig,
    StageConfig,
    TrainingConfig,
)

STAGE = {"sequence_length": 16, "steps": 3, "global_batch_tokens": 64, "lr": 1e-2}
NAN = float("nan")

REFUSED: list[tuple[type[Any], dict[str, Any], str]] = [
    (DistillConfig, {"kl": -0.5}, "distill.kl (-0.5) must be at least 0."),
    (DistillConfig, {"kl": NAN}, "distill.kl (nan) must be at least 0."),
    (DistillConfig, {"hidden": -1.0}, "distill.hidden (-1.0) must be at least 0."),
    (DistillConfig, {"temperature": 0.0}, "distill.temperature (0.0) must be above 0."),
    (DistillConfig, {"temperature": NAN}, "distill.temperature (nan) must be above 0."),
    (CheckpointConfig, {"interval_steps": -1}, "checkpoint.interval_steps (-1) must be at least 0"),
    (CheckpointConfig, {"keep_last": 0}, "checkpoint.keep_last (0) must be at least 1."),
    (
        CheckpointConfig, {"keep_every_steps": 0},
        "checkpoint.keep_every_steps (0) must be at least 1, or null.",
    ),
    (TrainingConfig, {"microbatch_rows": 0}, "training.microbatch_rows (0) must be at least 1."),
    (TrainingConfig, {"recompute_every": 0}, "training.recompute_every (0) must be at least 1."),
    (TrainingConfig, {"loss_chunk_tokens": 0}, "training.loss_chunk_tokens (0) must be at least 1"),
    (TrainingConfig, {"max_steps": 0}, "training.max_steps (0) must be at least 1, or null."),
    (TrainingConfig, {"num_threads": -1}, "training.num_threads (-1) must be at least 1, or null."),
    (EvaluationConfig, {"interval_steps": -1}, "evaluation.interval_steps (-1) must be at least 0"),
    (EvaluationConfig, {"rows": 0}, "evaluation.rows (0) must be at least 1."),
    (LoggingConfig, {"interval_steps": 0}, "logging.interval_steps (0) must be at least 1."),
    (OptimizerConfig, {"beta1": 1.0}, "optimizer.beta1 (1.0) must be from 0 to below 1."),
    (OptimizerConfig, {"beta2": -0.1}, "optimizer.beta2 (-0.1) must be from 0 to below 1."),
    (OptimizerConfig, {"eps": 0.0}, "optimizer.eps (0.0) must be above 0."),
    (
        OptimizerConfig, {"clip_norm": 0.0},
        "optimizer.clip_norm (0.0) must be above 0. Use null for no clipping.",
    ),
    (OptimizerConfig, {"weight_decay": NAN}, "optimizer.weight_decay (nan) must be at least 0."),
    (StageConfig, {**STAGE, "steps": 0}, "steps (0) must be at least 1."),
    (StageConfig, {**STAGE, "lr": -1.0}, "lr (-1.0) must be at least 0."),
    (
        StageConfig, {**STAGE, "global_batch_tokens": 40},
        "global_batch_tokens (40) must be a multiple of sequence_length: got 16. Use 32 or 48.",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    REFUSED,
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value)[:40],
)
def test_a_value_that_cannot_be_is_refused(
    kind: type[Any], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        kind(**values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"training": {"teacher": "DIR"}},
            r"training\.teacher \(DIR\) must come with distill\.kl or distill\.hidden above 0: got "
            r"0 and 0\. Set both the teacher and a weight, or neither\.",
        ),
        ({"distill": {"kl": 0.5}}, r"training\.teacher \(null\) must come .* got 0\.5 and 0\."),
        ({"distill": {"hidden": 2}}, r"training\.teacher \(null\) must come .* got 0 and 2\."),
        ({"stages": {}}, r"stages must have at least one entry\. Add stages\.main or a preset\."),
    ],
)
def test_values_that_belong_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_run(Path("data"), Path("run"), **changes)


def test_a_teacher_with_a_weight_is_accepted() -> None:
    changes = {"training": {"teacher": "DIR"}, "distill": {"hidden": 1.0, "offload": True}}
    assert tiny_run(Path("data"), Path("run"), **changes).distill.kl == 0.0
