"""A folder on its own: without Synfire, saved again by transformers, evaluated by others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.conversion.huggingface import SafetensorsFolder
from models.conversion.own_format import SOURCE, SOURCE_FILES
from models.conversion.source_config import read_config
from models.generation import generate
from tests.models.conversion.test_huggingface import same_bits
from tests.models.exported.folders import case, logits_of, open_folder, save
from tests.models.tiny import random_tokens, tiny_model
from tests.support.closeness import relative_error

pytest.importorskip("transformers")
BLOCKED = ("models", "parallel", "data", "training", "launch", "fla", "flash_attn", "triton")
SCRIPT = f"""
import sys

sys.modules |= dict.fromkeys({BLOCKED})
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

folder, given, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokens = load_file(given)["tokens"]
options = dict(attention_mask=torch.ones_like(tokens), max_new_tokens=8, do_sample=False)
with torch.no_grad():
    results = dict(logits=model(tokens).logits, text=model.generate(tokens, **options))
save_file(results, out)
"""


def test_a_folder_runs_where_there_is_no_synfire(tmp_path: Path) -> None:
    model = tiny_model(case("softmax experts"))
    folder = save(model, tmp_path / "out")
    tokens = random_tokens(2, 20)
    save_file({"tokens": tokens}, tmp_path / "tokens")
    place = {"HF_MODULES_CACHE": str(tmp_path / "copies"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", SCRIPT, folder, tmp_path / "tokens", tmp_path / "results"],
        cwd=tmp_path, env={**os.environ, **place}, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = load_file(tmp_path / "results")
    assert relative_error(results["logits"], logits_of(model, tokens)) < 1e-10
    assert torch.equal(results["text"], generate(model, tokens, max_new_tokens=8))


def test_every_source_file_travels(tmp_path: Path) -> None:
    folder = save(tiny_model(), tmp_path / "out")
    written = {path.name for path in SOURCE.glob("*.py")} - {"__init__.py"}
    assert written == set(SOURCE_FILES)
    for name in SOURCE_FILES:
        assert (folder / name).read_bytes() == (SOURCE / name).read_bytes()


@pytest.mark.parametrize("name", ["key-tied", "softmax experts"])
def test_what_transformers_saves_is_the_same_model(name: str, tmp_path: Path) -> None:
    folder = save(tiny_model(case(name)), tmp_path / "out")
    open_folder(folder).save_pretrained(tmp_path / "again")
    tokens = random_tokens(2, 12)
    with torch.no_grad():
        logits = [open_folder(tmp_path / each)(tokens).logits for each in ("out", "again")]
    assert torch.equal(*logits)
    before, after = (SafetensorsFolder(tmp_path / each) for each in ("out", "again"))
    assert read_config(after.config) == read_config(before.config)
    assert set(after.names()) == set(before.names())
    assert all(same_bits(after.load(each), before.load(each)) for each in before.names())
