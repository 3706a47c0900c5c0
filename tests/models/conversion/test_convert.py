from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.config import ModelConfig
from models.conversion.convert import plan_conversion, unused_tensors
from models.conversion.huggingface import INDEX, SafetensorsFolder
from models.conversion.new_parameters import ConversionOptions, KeyBias, gate_bias_of, xavier
from models.conversion.source_checks import warn_of_changes
from models.conversion.source_config import read_config
from models.conversion.target_tensor import OriginKind, TargetTensor
from models.conversion.weight_map import theirs
from models.expert_config import ExpertConfig
from models.layouts import parameter_layouts
from models.mixer_config import RopeConfig
from tests.models.conversion import tiny_sources
from tests.models.conversion.test_huggingface import same_bits
from tests.models.conversion.test_source_config import QWEN2_5_7B, SMALL, SPIKINGBRAIN_7B

pytest.importorskip("transformers")


class Listing:
    """Names and shapes of a folder without its data."""

    def __init__(self, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
        self.config = config
        self.shapes = shapes

    def names(self) -> tuple[str, ...]:
        return tuple(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16

    def load(self, name: str) -> torch.Tensor:
        raise AssertionError(f"planning must not load {name}")


def qwen2_listing(config: dict[str, Any]) -> Listing:
    """What a Qwen2 folder holds, written out by hand."""
    hidden, inner, vocab = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    dim = hidden // config["num_attention_heads"]
    keys = config["num_key_value_heads"] * dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        block = {
            "input_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (hidden, hidden), "self_attn.q_proj.bias": (hidden,),
            "self_attn.k_proj.weight": (keys, hidden), "self_attn.k_proj.bias": (keys,),
            "self_attn.v_proj.weight": (keys, hidden), "self_attn.v_proj.bias": (keys,),
            "self_attn.o_proj.weight": (hidden, hidden),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (inner, hidden), "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
        }  # fmt: skip
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    return Listing(config, shapes)


def to_linear(config: ModelConfig, mixers: str = "L S L") -> ModelConfig:
    return dataclasses.replace(config, mixers=mixers, window_tokens=8)


def by_name(plan: list[TargetTensor]) -> dict[str, TargetTensor]:
    return {tensor.name: tensor for tensor in plan}


def test_7b_is_planned_without_a_byte_of_data() -> None:
    source = qwen2_listing(QWEN2_5_7B)
    assert len(source.names()) == 339
    base = read_config(QWEN2_5_7B)
    target = dataclasses.replace(base, mixers="[L S]*14", window_tokens=4096)
    plan = plan_conversion(source, target)
    assert len(plan) == 395
    assert unused_tensors(source, plan) == []
    kinds = Counter(tensor.origin.kind for tensor in plan)
    assert kinds == {OriginKind.copied: 339, OriginKind.new: 56}
    assert [t.name for t in plan] == list(parameter_layouts(target))
    assert sum(math.prod(t.shape) for t in plan) == 7_616_542_976
    new = [t for t in plan if t.origin.kind is OriginKind.new]
    assert sum(math.prod(t.shape) for t in new) == 926_464
    assert {t.dtype for t in new} == {torch.float32}
    assert {t.dtype for t in plan if t.origin.kind is OriginKind.copied} == {torch.bfloat16}
    used = Counter(name for t in plan for name in t.origin.sources)
    assert set(used.values()) == {1}


@pytest.mark.parametrize("case", list(tiny_sources.CASES))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_import_is_bitwise(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = tiny_sources.save(case, tmp_path / "hf", dtype=dtype, max_shard_size="20KB")
    source = SafetensorsFolder(folder)
    assert (folder / INDEX).exists()
    expected = dict(tiny_sources.build(case, dtype=dtype).named_parameters())
    plan = plan_conversion(source, read_config(source.config))
    assert len(plan) == len(expected)
    for tensor in plan:
        (name,) = tensor.origin.sources
        assert tensor.origin.kind is OriginKind.copied
        assert tensor.dtype is dtype
        assert same_bits(tensor.load(), expected[name].detach()), tensor.name


def test_public_format_is_imported_bitwise(tmp_path: Path) -> None:
    raw = {**SPIKINGBRAIN_7B, **SMALL, "attn_layers": [1, 2], "sliding_window": 4}
    config = read_config(raw)
    values = {
        str(theirs(name, read_format_of(raw))): torch.randn(layout.global_shape)
        for name, layout in parameter_layouts(config).items()
    }
    (tmp_path / "config.json").write_text(json.dumps(raw))
    save_file(values, tmp_path / "model.safetensors")
    plan = plan_conversion(SafetensorsFolder(tmp_path), config)
    assert config.mixers == "L S*2 L"
    assert all(same_bits(t.load(), values[t.origin.sources[0]]) for t in plan)
    assert all(t.origin.kind is OriginKind.copied for t in plan)


def read_format_of(raw: dict[str, Any]) -> Any:
    from models.conversion.source_config import read_format

    return read_format(raw)


def test_conversion_reuses_everything_and_adds_gates(tmp_path: Path) -> None:
    source = SafetensorsFolder(tiny_sources.save("qwen2", tmp_path / "hf"))
    target = to_linear(read_config(source.config))
    plan = by_name(plan_conversion(source, target))
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    reused = [t for t in plan.values() if t.origin.kind is OriginKind.copied]
    assert {t.origin.sources[0] for t in reused} == set(stored)
    assert all(same_bits(t.load(), stored[t.origin.sources[0]]) for t in reused)
    new = [name for name, t in plan.items() if t.origin.kind is OriginKind.new]
    assert new == [
        f"blocks.{layer}.mixer.{name}"
        for layer in (0, 2)
        for name in ("gate_down.weight", "gate_up.weight", "gate_up.bias", "head_norm.weight")
    ]
    assert not plan["blocks.0.mixer.gate_up.weight"].load().any()
    assert not plan["blocks.0.mixer.gate_up.bias"].load().any()
    assert (plan["blocks.0.mixer.head_norm.weight"].load() == 1).all()
    down = plan["blocks.0.mixer.gate_down.weight"].load()
    assert 0 < float(down.abs().max()) <= 2**-2.5 * math.sqrt(6 / (16 + 32))
    assert not torch.equal(down, plan["blocks.2.mixer.gate_down.weight"].load())


def test_new_parameters_depend_on_seed_and_name_alone() -> None:
    first = xavier("blocks.0.mixer.gate_down.weight", (16, 32), 1)
    assert torch.equal(first, xavier("blocks.0.mixer.gate_down.weight", (16, 32), 1))
    assert not torch.equal(first, xavier("blocks.0.mixer.gate_down.weight", (16, 32), 2))
    assert not torch.equal(first, xavier("blocks.2.mixer.gate_down.weight", (16, 32), 1))
    variance = float(xavier("x", (400, 600), 1).var())
    assert variance == pytest.approx(2**-5 * 2 / 1000, rel=0.02)


@pytest.mark.parametrize("half_life", [1, 2.5, 16, 1000, 1e6])
@pytest.mark.parametrize("normalizer", [1.0, 16.0])
def test_gate_bias_gives_the_half_life(half_life: float, normalizer: float) -> None:
    bias = torch.tensor(gate_bias_of(half_life, normalizer), dtype=torch.float64)
    decay = torch.exp(torch.nn.functional.logsigmoid(bias) / normalizer)
    assert float(decay) ** half_life == pytest.approx(0.5, rel=1e-6)
    assert gate_bias_of(str(half_life), normalizer) == pytest.approx(float(bias))


def test_zero_gate_is_a_half_life_of_the_normalizer() -> None:
    assert gate_bias_of("zero", 16.0) == 0.0
    assert gate_bias_of(16.0, 16.0) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("value", ["long", 0.5, -3, 0, 2e6, math.nan])
def test_impossible_half_life_is_refused(value: float | str) -> None:
    with pytest.raises(ValueError, match="gate_init .* must be zero or a half-life of 1 to 10{6}"):
        gate_bias_of(value, 16.0)


def test_gate_init_reaches_the_linear_layers(tmp_path: Path) -> None:
    source = SafetensorsFolder(tiny_sources.save("qwen2", tmp_path / "hf"))
    target = to_linear(read_config(source.config))
    plan = by_name(plan_conversion(source, target, ConversionOptions(gate_init=64)))
    bias = plan["blocks.2.mixer.gate_up.bias"].load()
    assert bias.shape == (16,)
    assert torch.allclose(bias, torch.tensor(gate_bias_of(64, 16.0)))


def test_key_bias_zero_touches_linear_layers_only(tmp_path: Path) -> None:
    source = SafetensorsFolder(tiny_sources.save("qwen2", tmp_path / "hf"))
    target = to_linear(read_config(source.config))
    plan = by_name(plan_conversion(source, target, ConversionOptions(key_bias=KeyBias.zero)))
    for layer, is_linear in enumerate([True, False, True]):
        tensor = plan[f"blocks.{layer}.mixer.k_proj.bias"]
        assert (not tensor.load().any()) is is_linear
        assert (tensor.origin.kind is OriginKind.scaled) is is_linear
        assert tensor.load().shape == tensor.shape
    assert unused_tensors(source, list(plan.values())) == []


def test_tied_source_fills_an_untied_target(tmp_path: Path) -> None:
    source = SafetensorsFolder(tiny_sources.save("qwen2-tied", tmp_path / "hf"))
    base = read_config(source.config)
    assert base.tie_word_embeddings
    plan = by_name(plan_conversion(source, dataclasses.replace(base, tie_word_embeddings=False)))
    assert plan["head.weight"].origin.note == "the tied embedding"
    assert same_bits(plan["head.weight"].load(), plan["embedding.weight"].load())
    untied = SafetensorsFolder(tiny_sources.save("qwen2", tmp_path / "hf2"))
    target = dataclasses.replace(read_config(untied.config), tie_word_embeddings=True)
    with pytest.raises(ValueError, match="tie_word_embeddings .true. must be false"):
        plan_conversion(untied, target)


def test_stored_copy_of_a_tied_head_and_old_buffers_stay_unread() -> None:
    config = {"model_type": "qwen2", "tie_word_embeddings": True, **SMALL}
    listing = qwen2_listing(config)
    listing.shapes["model.layers.0.self_attn.rotary_emb.inv_freq"] = (4,)
    plan = plan_conversion(listing, read_config(config))
    assert unused_tensors(listing, plan) == [
        "lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq",
    ]  # fmt: skip


def test_dropped_mixers_are_listed_as_unused() -> None:
    config = {"model_type": "qwen2", **SMALL}
    listing = qwen2_listing(config)
    target = dataclasses.replace(read_config(config), mixers="F _ F F")
    unused = unused_tensors(listing, plan_conversion(listing, target))
    assert len(unused) == 8
    assert all(name.startswith("model.layers.1.") for name in unused)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, r"model.hidden_size \(64\) must equal the source's: got 32"),
        ({"vocab_size": 65}, r"model.vocab_size \(65\) must equal the source's: got 64"),
        ({"num_key_value_heads": 4}, r"num_key_value_heads \(4\) must equal .* got 2"),
        ({"head_dim": 16}, r"model.head_dim \(16\) must equal the source's: got 8"),
        ({"intermediate_size": 50}, r"model.intermediate_size \(50\) must equal .* got 48"),
        ({"mixers": "F*3", "ffns": "d*3"}, r"num_hidden_layers \(3\) must equal .* got 4"),
        ({"qkv_bias": False}, r"model.qkv_bias \(False\) must equal the source's: got True"),
        ({"qk_norm": True}, r"model.qk_norm \(True\) must equal the source's: got False"),
        (
            {"ffns": "d e d d", "moe": ExpertConfig(intermediate_size=24)},
            r"moe.intermediate_size \(24\) must be that of the dense FFN .* layer 1 .* got 48 in",
        ),
        (
            {"intermediate_size": 96, "ffns": "d e d d"},
            r"model.intermediate_size \(96\) must equal .* got 48",
        ),
    ],
)
def test_other_sizes_are_refused_with_both_numbers(changes: dict[str, Any], message: str) -> None:
    listing = qwen2_listing({"model_type": "qwen2", **SMALL})
    target = dataclasses.replace(read_config(listing.config), **changes)
    with pytest.raises(ValueError, match=message):
        plan_conversion(listing, target)


def test_changed_constants_are_said(caplog: pytest.LogCaptureFixture) -> None:
    base = read_config({"model_type": "qwen2", **SMALL})
    warn_of_changes(base, dataclasses.replace(base, mixers="L*4"))
    assert not caplog.records
    warn_of_changes(base, dataclasses.replace(base, rope=RopeConfig(theta=5.0)))
    assert "model.rope" in caplog.text
    windows = dataclasses.replace(base, mixers="F S F S", window_tokens=8)
    caplog.clear()
    warn_of_changes(windows, dataclasses.replace(windows, mixers="S F S F", window_tokens=4))
    assert not caplog.records
    warn_of_changes(windows, dataclasses.replace(windows, window_includes_self=False))
    assert "model.visible_window_tokens (9) is not the source's (8)" in caplog.text
    warn_of_changes(base, dataclasses.replace(base, rope=RopeConfig(theta=5.0)))
    assert "is not the source's" in caplog.text


def test_missing_extra_and_misshapen_tensors() -> None:
    config = {"model_type": "qwen2", **SMALL}
    target = read_config(config)
    listing = qwen2_listing(config)
    del listing.shapes["model.layers.2.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"hold 51 tensors: model.layers.2.mlp.up_proj.weight is"):
        plan_conversion(listing, target)
    listing = qwen2_listing(config)
    listing.shapes |= {"model.layers.4.input_layernorm.weight": (32,), "z": (1,)}
    with pytest.raises(ValueError, match=r"4.input_layernorm.weight \(32,\) must be known.*1 more"):
        plan_conversion(listing, target)
    listing = qwen2_listing(config)
    listing.shapes["model.norm.weight"] = (31,)
    with pytest.raises(ValueError, match=r"norm.weight \(31,\) must have the shape .* got \(32,\)"):
        plan_conversion(listing, target)
    listing = qwen2_listing({**config, "num_hidden_layers": 3})
    listing.config = config
    with pytest.raises(ValueError, match=r"is missing \(and 11 more\)"):
        plan_conversion(listing, target)


def test_a_linear_source_layer_stays_linear() -> None:
    raw = {**SPIKINGBRAIN_7B, **SMALL, "attn_layers": [1, 3], "sliding_window": 4}
    config = read_config(raw)
    shapes = {
        str(theirs(name, read_format_of(raw))): layout.global_shape
        for name, layout in parameter_layouts(config).items()
    }
    listing = Listing(raw, shapes)
    with pytest.raises(ValueError, match="layer 2 must stay L as in the source: got F"):
        plan_conversion(listing, dataclasses.replace(config, mixers="L S F S"))
    other = dataclasses.replace(config.linear, gate_low_rank_dim=8)
    with pytest.raises(ValueError, match=r"model\.linear\.gate_low_rank_dim \(8\) must equal"):
        plan_conversion(listing, dataclasses.replace(config, linear=other))
    plan = plan_conversion(listing, dataclasses.replace(config, mixers="L L L S"))
    assert [t.name for t in plan if t.origin.kind is OriginKind.new][0].startswith("blocks.1.")


def test_fitted_values_replace_initial_ones() -> None:
    listing = qwen2_listing({"model_type": "qwen2", **SMALL})
    target = dataclasses.replace(read_config(listing.config), mixers="L F F F")
    norm, bias = torch.rand(8), torch.rand(16)
    fitted = {
        "blocks.0.mixer.head_norm.weight": (norm, "measured"),
        "blocks.0.mixer.k_proj.bias": (bias, "centred"),
    }
    plan = by_name(plan_conversion(listing, target, fitted=fitted))
    tensor = plan["blocks.0.mixer.head_norm.weight"]
    assert (tensor.origin.kind, tensor.origin.note) == (OriginKind.new, "measured")
    assert torch.equal(tensor.load(), norm)
    tensor = plan["blocks.0.mixer.k_proj.bias"]
    assert (tensor.origin.kind, tensor.dtype) == (OriginKind.scaled, torch.bfloat16)
    assert tensor.origin.sources == ("model.layers.0.self_attn.k_proj.bias",)
    assert torch.equal(tensor.load(), bias.to(torch.bfloat16))
