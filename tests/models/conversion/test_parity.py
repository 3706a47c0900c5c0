"""An imported model computes what the Hugging Face model computes, forward and backward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from models.conversion.convert import plan_conversion
from models.conversion.huggingface import SafetensorsFolder
from models.conversion.source_config import read_config, read_format
from models.conversion.weight_map import theirs
from models.model import Model
from models.sequence import SequenceContext
from tests.models.conversion import tiny_sources
from tests.support.closeness import assert_close

pytest.importorskip("transformers")

ROWS, TOKENS = 2, 40


def imported(folder: Path, dtype: torch.dtype) -> Model:
    source = SafetensorsFolder(folder)
    config = read_config(source.config)
    model = Model(config)
    state = {t.name: t.load().to(dtype).clone() for t in plan_conversion(source, config)}
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(True)


def sample() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 61, (ROWS, TOKENS), generator=generator)


def run_theirs(model: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logits = model(input_ids=tokens, use_cache=False).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5)).to(logits)
    (logits * weights).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def run_ours(model: Model, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logits = model(tokens, SequenceContext.one_document_per_row(ROWS, TOKENS))
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5)).to(logits)
    (logits * weights).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), grads


def compare(folder: Path, hf: Any, dtype: torch.dtype, tolerance: float) -> None:
    tokens = sample()
    ours = imported(folder, dtype)
    logits, grads = run_ours(ours, tokens)
    expected, expected_grads = run_theirs(hf, tokens)
    assert logits.dtype is dtype
    assert_close(logits, expected, relative=tolerance, name="logits")
    format = read_format(SafetensorsFolder(folder).config)
    assert len(grads) == len(expected_grads)
    for name, grad in grads.items():
        known = theirs(name, format)
        assert known is not None
        assert_close(grad, expected_grads[known], relative=tolerance, name=name)


@pytest.mark.parametrize("case", list(tiny_sources.CASES))
def test_float64_with_exact_tables(case: str, tmp_path: Path) -> None:
    folder = tiny_sources.save(case, tmp_path / "hf", dtype=torch.float64)
    hf = tiny_sources.exact(tiny_sources.build(case, dtype=torch.float64), rotary=True)
    compare(folder, hf, torch.float64, 1e-9)


@pytest.mark.parametrize("case", ["qwen2", "qwen3", "llama", "mistral"])
def test_float64_with_their_tables(case: str, tmp_path: Path) -> None:
    """Their rotary tables are float32, which is all of the difference."""
    folder = tiny_sources.save(case, tmp_path / "hf", dtype=torch.float64)
    hf = tiny_sources.exact(tiny_sources.build(case, dtype=torch.float64), rotary=False)
    compare(folder, hf, torch.float64, 1e-6)


@pytest.mark.parametrize("case", ["qwen2", "qwen3", "llama", "mistral"])
def test_float32_as_it_is(case: str, tmp_path: Path) -> None:
    folder = tiny_sources.save(case, tmp_path / "hf")
    compare(folder, tiny_sources.build(case), torch.float32, 1e-4)
