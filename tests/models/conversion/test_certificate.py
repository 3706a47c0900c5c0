from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from models.config import ModelConfig
from models.conversion.block_stream import BlockStream
from models.conversion.certificate import (
    HALF_LIFE_EDGES,
    build_certificate,
    compare_numerically,
)
from models.conversion.convert import plan_conversion
from models.conversion.huggingface import SafetensorsFolder
from models.conversion.new_parameters import ConversionOptions, KeyBias
from models.model import Model
from models.sequence import SequenceContext
from tests.models.conversion import tiny_sources
from tests.models.conversion.test_attention_transfer import (
    ROWS,
    TOKENS,
    full_model,
    rows,
    source_of,
)
from tests.support.closeness import assert_close

pytest.importorskip("transformers")


def numbers(
    source: SafetensorsFolder, target: ModelConfig, options: ConversionOptions | None = None
) -> dict[str, Any]:
    return compare_numerically(source, target, plan_conversion(source, target, options), rows())


def streams(model: Model) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Hidden states after each block and logits, from the whole model at once."""
    seen: list[torch.Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _args, out: seen.append(out.detach()))
    sample = rows()
    with torch.no_grad():
        logits = model(sample.tokens, SequenceContext.one_document_per_row(ROWS, TOKENS))
    return seen, logits


def test_an_import_changes_nothing(tmp_path: Path) -> None:
    source, config = source_of(tmp_path / "hf", "qwen2-windows")
    found = numbers(source, config)
    assert [layer["relative_error"] for layer in found["layers"]] == [0.0, 0.0, 0.0]
    assert [layer["cosine"] for layer in found["layers"]] == pytest.approx([1.0, 1.0, 1.0])
    assert found["logit_kl"] == 0.0
    assert found["perplexity"]["source"] == found["perplexity"]["target"]
    assert found["linear_layers"] == []
    hf = tiny_sources.exact(tiny_sources.build("qwen2-windows", dtype=torch.float64), rotary=True)
    sample = rows()
    logits = hf(input_ids=sample.tokens, use_cache=False).logits
    loss = float(F.cross_entropy(logits.flatten(0, 1), sample.labels.flatten()).detach())
    assert found["loss"]["source"] == pytest.approx(loss, rel=1e-9)
    assert found["perplexity"]["source"] == pytest.approx(math.exp(loss), rel=1e-9)


@pytest.mark.parametrize("case", ["qwen2", "qwen2-tied", "qwen3"])
def test_streamed_numbers_equal_the_whole_models(case: str, tmp_path: Path) -> None:
    source, config = source_of(tmp_path / "hf", case)
    target = dataclasses.replace(config, mixers="L S L", window_tokens=5)
    found = numbers(source, target)
    before, old = streams(full_model(source, config))
    after, new = streams(full_model(source, target))
    for layer, row in enumerate(found["layers"]):
        error = (after[layer] - before[layer]).norm() / before[layer].norm()
        assert row["relative_error"] == pytest.approx(float(error), rel=1e-9)
        cosine = F.cosine_similarity(before[layer], after[layer], dim=-1).mean()
        assert row["cosine"] == pytest.approx(float(cosine), rel=1e-9)
        assert (row["source"], row["target"]) == ("F", "LSL"[layer])
    probabilities = [logits.double().log_softmax(-1) for logits in (old, new)]
    kl = (probabilities[0].exp() * (probabilities[0] - probabilities[1])).sum(-1).mean()
    assert found["logit_kl"] == pytest.approx(float(kl), rel=1e-9)
    labels = rows().labels.flatten()
    for key, values in zip(("source", "target"), probabilities, strict=True):
        loss = float(F.nll_loss(values.flatten(0, 1), labels))
        assert found["loss"][key] == pytest.approx(loss, rel=1e-9)
    assert found["tokens"] == ROWS * TOKENS


def test_masked_labels_count_nothing(tmp_path: Path) -> None:
    source, config = source_of(tmp_path / "hf")
    sample = rows()
    sample.labels[:, ::2] = -100
    plan = plan_conversion(source, config)
    found = compare_numerically(source, config, plan, sample)
    model = full_model(source, config)
    logits = model(sample.tokens, SequenceContext.one_document_per_row(ROWS, TOKENS))
    expected = F.cross_entropy(logits.flatten(0, 1), sample.labels.flatten(), ignore_index=-100)
    assert found["loss"]["source"] == pytest.approx(float(expected.detach()), rel=1e-9)


def test_state_of_linear_layers(tmp_path: Path) -> None:
    source, config = source_of(tmp_path / "hf")
    target = dataclasses.replace(config, mixers="F F L")
    state = numbers(source, target, ConversionOptions(gate_init=25))["linear_layers"]
    assert [entry["layer"] for entry in state] == [2]
    model = full_model(source, target)
    block: Any = model.blocks[2]
    inputs: list[torch.Tensor] = []
    block.mixer.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    streams(model)
    keys = block.mixer.k_proj
    x, weight, bias = (t.detach() for t in (inputs[0], keys.weight, keys.bias))
    product = x @ weight.T
    assert state[0]["key_bias_norm"] == pytest.approx(float(bias.norm()), rel=1e-9)
    mean_norm = float(product.norm(dim=-1).mean())
    assert state[0]["key_projection_norm"] == pytest.approx(mean_norm, rel=1e-9)
    dead = ((product + bias).relu().sum(dim=(0, 1)) == 0).double().mean()
    assert state[0]["dead_key_channels"] == pytest.approx(float(dead))
    histogram = state[0]["half_life_tokens"]
    expected_bin = sum(edge <= 25 for edge in HALF_LIFE_EDGES)
    assert histogram["share"] == [float(i == expected_bin) for i in range(len(HALF_LIFE_EDGES) + 1)]


def test_dead_channels_are_seen(tmp_path: Path) -> None:
    source, config = source_of(tmp_path / "hf")
    target = dataclasses.replace(config, mixers="L F F")
    plan = {tensor.name: tensor for tensor in plan_conversion(source, target)}
    name = "blocks.0.mixer.k_proj.bias"
    bias = plan[name].load().clone()
    bias[:4] = -1e3
    plan[name] = dataclasses.replace(plan[name], load_part=lambda: bias)
    found = compare_numerically(source, target, list(plan.values()), rows())
    assert found["linear_layers"][0]["dead_key_channels"] >= 4 / 16
    assert found["linear_layers"][0]["key_bias_norm"] > 1e3


def test_certificate_explains_every_tensor(tmp_path: Path) -> None:
    source, config = source_of(tmp_path / "hf")
    target = dataclasses.replace(config, mixers="L _ S", window_tokens=4)
    options = ConversionOptions(key_bias=KeyBias.zero, gate_init=32.0)
    plan = plan_conversion(source, target, options)
    alignment = [{"layer": 0, "before": 1.0, "after": 0.5, "tokens": 9, "kept": True}]
    found = build_certificate(source, target, options, plan, alignment=alignment)
    found = json.loads(json.dumps(found))
    assert found["tensors"].keys() == {name for name, _ in Model(target).named_parameters()}
    assert found["unexplained_tensors"] == []
    assert found["origins"] == {"copied": len(plan) - 5, "reshaped": 0, "scaled": 1, "new": 4}
    assert sum(found["origins"].values()) == len(plan) == found["target"]["num_tensors"]
    assert len(found["source"]["unused_tensors"]) == 8
    assert found["source"]["format"] == "qwen2"
    assert found["options"]["gate_init"] == 32.0
    assert found["options"]["key_bias"] == "zero"
    assert found["numeric"] == {"skipped": True}
    assert found["alignment"] == alignment
    entry = found["tensors"]["blocks.0.mixer.k_proj.bias"]
    assert entry["origin"] == "scaled"
    assert entry["source"] == ["model.layers.0.self_attn.k_proj.bias"]
    assert (entry["shape"], entry["dtype"]) == ([16], "float64")


def test_a_plan_with_a_hole_says_so(tmp_path: Path) -> None:
    source, config = source_of(tmp_path / "hf")
    plan = plan_conversion(source, config)[1:]
    found = build_certificate(source, config, ConversionOptions(), plan)
    assert found["unexplained_tensors"] == ["embedding.weight"]


def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    source, config = source_of(tmp_path / "hf")
    loads = {t.name: t.load for t in plan_conversion(source, config)}
    sample = rows()
    sample.tokens[1, 3] = 61
    with pytest.raises(ValueError, match=r"token id \(61\) must be below vocab_size: got 61"):
        BlockStream(config, lambda name: loads[name]()).embed(sample)


def test_streamed_logits_are_cast_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, config = source_of(tmp_path / "hf")
    loads = {t.name: t.load for t in plan_conversion(source, config)}
    stream = BlockStream(config, lambda name: loads[name]())
    hidden = torch.randn(5, 32, dtype=torch.float64)
    whole = stream.logits(hidden)
    monkeypatch.setattr("models.conversion.block_stream._VOCABULARY_CHUNK", 7)
    assert_close(stream.logits(hidden), whole, relative=1e-14)
    assert_close(whole, hidden @ loads["head.weight"]().T, relative=1e-14)
