"""`launch.generate`: the same continuation as full forward passes, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launch.checkpoints import open_model
from launch.compose import load_config
from launch.config_errors import ConfigError
from launch.generate import GenerateConfig, continue_text, main
from models.sequence import SequenceContext
from parallel.checkpoint import step_directory
from tests.launch.trained import prepared, trained, without_tokenizer

__all__ = ["prepared", "trained"]

PROMPT = "def alpha_beta(gamma):"


def config(trained: Path, *overrides: str) -> GenerateConfig:
    given = ["backend=cpu", f"checkpoint={trained}", f"prompt='{PROMPT}'", *overrides]
    return load_config("generate", GenerateConfig, given)


def test_greedy_text_is_what_full_forward_passes_give(trained: Path) -> None:
    text, num_new, seconds = continue_text(
        config(trained, "max_new_tokens=12", "stop_at_eos=false", "precision=fp64")
    )
    opened = open_model(trained)
    assert opened.tokenizer is not None
    model = opened.model.double()
    tokens = opened.tokenizer.encode(PROMPT)
    for _ in range(12):
        context = SequenceContext.one_document_per_row(1, len(tokens))
        logits = model(torch.tensor([tokens]), context)[0, -1]
        tokens.append(int(logits.argmax()))
    assert text == opened.tokenizer.decode(tokens)
    assert num_new == 12
    assert seconds > 0


def test_sampling_depends_on_its_seed_only(trained: Path) -> None:
    def sampled(*overrides: str) -> str:
        options = ["temperature=1.0", "top_k=50", "top_p=0.95", "max_new_tokens=16"]
        return continue_text(config(trained, *options, *overrides))[0]

    assert sampled("seed=5") == sampled("seed=5")
    assert len({sampled(f"seed={seed}") for seed in range(4)}) > 1
    assert sampled("spiking=adaptive").startswith(PROMPT)


def test_an_empty_prompt_starts_a_document(trained: Path) -> None:
    text, num_new, _ = continue_text(
        config(trained, "prompt=''", "max_new_tokens=3", "stop_at_eos=false")
    )
    assert num_new == 3
    assert isinstance(text, str)


def test_a_checkpoint_without_a_tokenizer_is_refused(trained: Path, tmp_path: Path) -> None:
    without_tokenizer(step_directory(trained, 6), tmp_path / "bare")
    with pytest.raises(ValueError, match=r"must hold a tokenizer to read the prompt: got none"):
        continue_text(config(tmp_path / "bare"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_new_tokens=0", r"max_new_tokens \(0\) must be at least 1"),
        ("temperature=hot", r"temperature"),
    ],
)
def test_wrong_options_are_refused(trained: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(trained, override)


def test_sampling_options_out_of_range_are_refused(trained: Path) -> None:
    with pytest.raises(ValueError, match=r"top_p \(1\.5\) must be"):
        continue_text(config(trained, "top_p=1.5"))


def test_the_command_prints_text_and_logs_the_speed(
    trained: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    arguments = [f"checkpoint={trained}", f"prompt='{PROMPT}'", "max_new_tokens=4"]
    monkeypatch.setattr("sys.argv", ["generate", *arguments])
    with caplog.at_level("INFO"):
        main()
    assert capsys.readouterr().out.startswith(PROMPT)
    assert "new tokens, " in caplog.text
    assert "tokens/s" in caplog.text
