"""`launch.convert` never holds more than a few tensors of a large checkpoint."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.conversion.huggingface import copy_tokenizer
from tests.launch.trained import prepared

__all__ = ["prepared"]

ROOT = Path(__file__).resolve().parents[2]

MEMORY_SCRIPT = """
import dataclasses, sys, threading
from pathlib import Path
from launch.convert import convert, target_model
from launch.convert_config import ConvertConfig, UpcycleConfig
from models.conversion.huggingface import read_json
from models.conversion.new_parameters import UpcycleMode
from models.conversion.source_config import read_config
from models.mixer_config import FeatureMap, GateKind

def base(source):
    return read_config(read_json(Path(source) / "config.json"))

def anonymous():
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024

peak, done = [anonymous()], threading.Event()

def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())

before = peak[0]
watcher = threading.Thread(target=watch)
watcher.start()
source, out, mixers, text, experts = sys.argv[1:]
changes = {"mixers": mixers}
if experts != "0":
    model = target_model(ConvertConfig(source=source, out=out), base(source))
    moe = dataclasses.replace(model.moe, num_experts=int(experts))
    linear = dataclasses.replace(
        model.linear, feature_map=FeatureMap.sigmoid, gate=GateKind.key_tied
    )
    model = dataclasses.replace(model, moe=moe, linear=linear, window_tokens=64)
    changes |= {"model": model, "ffns": f"d e*{model.num_hidden_layers - 1}"}
    changes["upcycle"] = UpcycleConfig(mode=UpcycleMode.measured)
convert(ConvertConfig(source=source, out=out, window_tokens=64, text=text, sequence_length=64,
                      text_tokens=128, **changes))
done.set()
watcher.join()
print(before, max(peak[0], anonymous()))
"""


def write_large_source(folder: Path, text: Path, *, layers: int) -> tuple[int, int]:
    """A sharded bfloat16 Qwen2 folder of noise; returns its bytes and its largest tensor's."""
    hidden, inner, vocab = 1024, 8192, 8192
    folder.mkdir()
    base = {"model_type": "qwen2", "vocab_size": vocab, "hidden_size": hidden,
            "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": 8,
            "num_key_value_heads": 2, "rms_norm_eps": 1e-6}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(base))
    copy_tokenizer(text / "tokenizer", folder)
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (256, hidden),
              "self_attn.v_proj": (256, hidden), "self_attn.o_proj": (hidden, hidden),
              "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
              "mlp.down_proj": (hidden, inner)}  # fmt: skip
    noise = {shape: (0.02 * torch.randn(shape)).to(torch.bfloat16) for shape in shapes.values()}
    weight_map, total = {}, 0
    for layer in range(layers + 1):
        values = {}
        if layer == layers:
            values = {"model.embed_tokens.weight": torch.randn(vocab, hidden),
                      "lm_head.weight": torch.randn(vocab, hidden),
                      "model.norm.weight": torch.ones(hidden)}  # fmt: skip
        for name, shape in shapes.items() if layer < layers else ():
            values[f"model.layers.{layer}.{name}.weight"] = noise[shape].clone()
            if name.endswith(("q_proj", "k_proj", "v_proj")):
                values[f"model.layers.{layer}.{name}.bias"] = torch.randn(shape[0])
        for name in ("input_layernorm", "post_attention_layernorm") if layer < layers else ():
            values[f"model.layers.{layer}.{name}.weight"] = torch.ones(hidden)
        file = f"model-{layer + 1:05d}-of-{layers + 1:05d}.safetensors"
        values = {name: value.to(torch.bfloat16) for name, value in values.items()}
        save_file(values, folder / file)
        weight_map |= dict.fromkeys(values, file)
        total += sum(value.nbytes for value in values.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total, vocab * hidden * 2


def convert_apart(
    folder: Path, out: Path, text: Path, *, mixers: str, experts: int = 0
) -> tuple[int, int]:
    """Convert in a process of its own; its anonymous memory before and at its peak."""
    result = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, str(folder), str(out), mixers, str(text),
         str(experts)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    before, peak = (int(number) for number in result.stdout.split()[-2:])
    return before, peak


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's RssAnon")
def test_memory_does_not_grow_with_the_checkpoint(prepared: Path, tmp_path: Path) -> None:
    """Anonymous memory is below 1.5 x the largest tensor + 1 GiB, however many layers there are."""
    grown = []
    for layers in (8, 18):
        folder, out = tmp_path / f"hf{layers}", tmp_path / f"out{layers}"
        num_bytes, largest = write_large_source(folder, prepared, layers=layers)
        before, peak = convert_apart(folder, out, prepared, mixers=f"[L S]*{layers // 2}")
        assert peak < 1.5 * largest + 2**30
        grown.append(peak - before)
        sys.stdout.write(f"{layers} layers: {num_bytes} bytes, anonymous {before} to {peak}\n")
        shutil.rmtree(folder)
        shutil.rmtree(out)
    assert num_bytes > 1e9
    assert grown[1] < 0.25 * num_bytes
    assert grown[1] < grown[0] + 64 * 2**20


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's RssAnon")
def test_memory_does_not_grow_with_the_number_of_experts(prepared: Path, tmp_path: Path) -> None:
    """Branches and experts, calibrated, measured, written and judged within the same bound."""
    folder, grown = tmp_path / "hf", []
    _, largest = write_large_source(folder, prepared, layers=2)
    for experts in (2, 16):
        out = tmp_path / f"out{experts}"
        before, peak = convert_apart(folder, out, prepared, mixers="L+S*2", experts=experts)
        assert peak < 1.5 * largest + 2**30
        num_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        grown.append(peak - before)
        sys.stdout.write(f"{experts} experts: {num_bytes} bytes, anonymous {before} to {peak}\n")
        shutil.rmtree(out)
    assert num_bytes > 8e8
    assert grown[1] < grown[0] + 64 * 2**20
