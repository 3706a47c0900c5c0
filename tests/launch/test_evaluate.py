"""`launch.evaluate`: the logits contract, perplexity, needle, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.config import DataConfig
from data.loader import heldout_rows
from launch.checkpoints import open_model
from launch.compose import load_config
from launch.config_errors import ConfigError
from launch.evaluate import EvaluateConfig, evaluate, main
from models.sequence import SequenceContext
from tests.launch.trained import prepared, trained
from tests.training.tiny_run import prepare_data

__all__ = ["prepared", "trained"]


def config(*overrides: str) -> EvaluateConfig:
    return load_config("evaluate", EvaluateConfig, ["backend=cpu", *overrides])


def measured(trained: Path, prepared: Path, *overrides: str) -> dict[str, Any]:
    given = [f"checkpoint={trained}", f"data.path={prepared}", "sequence_length=32", "rows=6"]
    return evaluate(config(*given, *overrides))


def test_perplexity_equals_a_plain_forward_pass(trained: Path, prepared: Path) -> None:
    found = measured(trained, prepared)
    rows = heldout_rows(prepared, sequence_length=32, rows=6)
    context = SequenceContext.from_document_ids(rows.document_ids)
    logits = open_model(trained).model(rows.tokens, context)
    losses = torch.nn.functional.cross_entropy(
        logits.reshape(-1, 300).double(), rows.labels.reshape(-1), reduction="none"
    ).reshape(rows.labels.shape)
    is_counted = rows.labels >= 0
    assert found["loss"] == pytest.approx(float(losses[is_counted].mean()), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["num_tokens"] == int(is_counted.sum())
    is_far = is_counted & (context.positions >= 8)
    expected = math.exp(float(losses[is_far].mean()))
    assert found["perplexity_beyond_window"] == pytest.approx(expected, rel=1e-5)
    assert found["window_tokens"] == 8
    assert found["sparsity"] is None
    assert found["step"] == 6


def test_the_boundary_of_the_window_can_be_set(trained: Path, prepared: Path) -> None:
    found = measured(trained, prepared, "window_tokens=31")
    assert found["window_tokens"] == 31
    assert (
        found["perplexity_beyond_window"] != measured(trained, prepared)["perplexity_beyond_window"]
    )


def test_spiking_measures_sparsity_and_changes_the_loss(trained: Path, prepared: Path) -> None:
    plain = measured(trained, prepared)
    spiked = measured(trained, prepared, "spiking=adaptive")
    assert spiked["loss"] != plain["loss"]
    assert spiked["loss"] == pytest.approx(plain["loss"], rel=0.05)
    sparsity = spiked["sparsity"]
    assert 0.05 < sparsity["silent_share"] < 0.6
    assert sparsity["firing_rate"] == pytest.approx(sparsity["mean_spikes"] / 9)
    sites = {key.rsplit("/", 1)[0] for key in spiked["spikes"]}
    assert len(sites) == 8
    coarse = measured(trained, prepared, "spiking=adaptive", "spiking.k=1")
    assert coarse["sparsity"]["silent_share"] > sparsity["silent_share"]


def test_a_mixture_is_weighted_by_tokens(trained: Path, prepared: Path, tmp_path: Path) -> None:
    """The same text again: each folder's figure and the whole are equal, tokens double."""
    copied = Path(shutil.copytree(prepared, tmp_path / "copy"))
    data = DataConfig(mixture={str(prepared): 1.0, str(copied): 3.0})
    given = config(f"checkpoint={trained}", "sequence_length=32", "rows=3")
    found = evaluate(dataclasses.replace(given, data=data))
    alone = measured(trained, prepared, "rows=3")
    assert found["perplexity"] == pytest.approx(alone["perplexity"])
    assert found["perplexity_by_folder"] == dict.fromkeys(
        (str(prepared), str(copied)), pytest.approx(alone["perplexity"])
    )
    assert found["num_tokens"] == 2 * alone["num_tokens"]


def test_needle_recall_has_a_row_a_length_and_depth(trained: Path, prepared: Path) -> None:
    found = measured(
        trained, prepared, "needle.lengths=[64]", "needle.depths=[0.0,0.5]", "needle.samples=2"
    )
    rows = found["needle"]
    assert [(row["length"], row["depth"], row["num_samples"]) for row in rows] == [
        (64, 0.0, 2), (64, 0.5, 2),
    ]  # fmt: skip
    for row in rows:
        assert 0.0 <= row["exact_match"] <= 1.0
        assert row["log_probability"] < 0.0
        assert 1.0 <= row["rank"] <= 300.0


def test_logits_are_float32_of_every_position(trained: Path, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 300, (3, 20)).astype(np.int32)
    np.save(tmp_path / "ids.npy", ids)
    found = evaluate(
        config(
            f"checkpoint={trained}", f"logits.tokens={tmp_path / 'ids.npy'}",
            f"logits.out={tmp_path / 'deep' / 'logits.npy'}",
        )
    )  # fmt: skip
    logits = np.load(tmp_path / "deep" / "logits.npy")
    assert (logits.dtype, logits.shape) == (np.float32, (3, 20, 300))
    assert found["logits"]["shape"] == [3, 20, 300]
    assert "perplexity" not in found
    tokens = torch.from_numpy(ids.astype(np.int64))
    context = SequenceContext.one_document_per_row(3, 20)
    expected = open_model(trained).model(tokens, context)
    np.testing.assert_allclose(logits, expected.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.zeros((2, 3)), r"must hold integers \[B, T\]: got float64 \(2, 3\)"),
        (np.zeros(3, dtype=np.int64), r"must hold integers \[B, T\]: got int64 \(3,\)"),
        (np.zeros((0, 3), dtype=np.int64), r"must hold integers"),
        (np.full((1, 3), 300), r"must be ids from 0 to 299: got 300 to 300"),
        (np.full((1, 3), -1), r"must be ids from 0 to 299: got -1 to -1"),
    ],
    ids=["floats", "one dimension", "empty", "too large", "negative"],
)
def test_token_files_that_cannot_be_run_are_refused(
    trained: Path, tmp_path: Path, ids: np.ndarray[Any, Any], message: str
) -> None:
    np.save(tmp_path / "ids.npy", ids)
    out = tmp_path / "logits.npy"
    given = config(
        f"checkpoint={trained}", f"logits.tokens={tmp_path / 'ids.npy'}", f"logits.out={out}"
    )
    with pytest.raises(ValueError, match=message):
        evaluate(given)
    assert not out.exists()


def test_a_file_that_is_no_array_is_refused(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "ids.npy").write_text("1 2 3")
    for name in ("ids.npy", "missing.npy"):
        given = config(
            f"checkpoint={trained}", f"logits.tokens={tmp_path / name}", "logits.out=out.npy"
        )
        with pytest.raises(ValueError, match=r"logits\.tokens \(.*\) must be an \.npy file"):
            evaluate(given)


def test_data_of_other_tokens_is_refused(trained: Path, tmp_path: Path) -> None:
    other = prepare_data(tmp_path / "other", seed=5, vocab_size=299)
    with pytest.raises(ValueError, match=r"tokenizer of the data .* must be the checkpoint's"):
        measured(trained, other)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rows=0"], r"rows \(0\) must be at least 1"),
        (["logits.tokens=x"], r"logits\.tokens and logits\.out must be set together"),
        (["spiking=loud"], r"spiking \(loud\) must be one of"),
        (["chekpoint=x"], r"chekpoint is not a known key\. Did you mean checkpoint"),
    ],
)
def test_wrong_command_lines_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config("checkpoint=x", *overrides)


def test_the_command_writes_and_prints_json(
    trained: Path,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "results" / "base.json"
    given = [f"checkpoint={trained}", f"data.path={prepared}", "rows=2", "sequence_length=16"]
    monkeypatch.setattr("sys.argv", ["evaluate", *given, f"out={out}"])
    main()
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text())
    assert printed["perplexity"] > 1
