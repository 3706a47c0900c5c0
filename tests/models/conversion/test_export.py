from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from models.config import ModelConfig, NeuronKind, SpikingConfig
from models.conversion.config_keys import Format
from models.conversion.convert import plan_conversion
from models.conversion.export import export_folder
from models.conversion.huggingface import INDEX, SafetensorsFolder, TensorEntry
from models.conversion.source_config import read_config, read_format
from models.conversion.target_config import check_format, choose_format, write_config
from models.layouts import parameter_layouts
from models.mixer_config import (
    FeatureMap,
    GateKind,
    LinearAttentionConfig,
    RopeConfig,
    RopeType,
    SinkConfig,
)
from tests.models.conversion import tiny_sources
from tests.models.conversion.test_huggingface import same_bits

transformers = pytest.importorskip("transformers")

HYBRID = ModelConfig(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, mixers="L S L", ffns="d*3", qkv_bias=True,
    window_tokens=8, bos_token_id=1, eos_token_id=2, rope=RopeConfig(theta=1e4),
)  # fmt: skip
SIGMOID = LinearAttentionConfig(feature_map=FeatureMap.sigmoid)
KEY_TIED = dataclasses.replace(SIGMOID, gate=GateKind.key_tied)


def imported(folder: Path) -> tuple[ModelConfig, list[TensorEntry]]:
    source = SafetensorsFolder(folder)
    config = read_config(source.config)
    plan = plan_conversion(source, config)
    return config, [TensorEntry(t.name, t.shape, t.dtype, t.load) for t in plan]


def random_entries(config: ModelConfig, dtype: torch.dtype) -> list[TensorEntry]:
    entries = []
    for number, (name, layout) in enumerate(parameter_layouts(config).items()):
        generator = torch.Generator().manual_seed(number)
        value = torch.randn(layout.global_shape, generator=generator).to(dtype)
        entries.append(TensorEntry(name, layout.global_shape, dtype, lambda value=value: value))
    return entries


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: value
        for file in folder.glob("*.safetensors")
        for name, value in load_file(file).items()
    }


@pytest.mark.parametrize("case", list(tiny_sources.CASES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_import_then_export_is_bitwise(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Every tensor equals the old folder's bit by bit, and transformers computes the same."""
    old = tiny_sources.save(case, tmp_path / "old", dtype=dtype)
    config, entries = imported(old)
    base = read_format(json.loads((old / "config.json").read_text()))
    format = choose_format(config, preferred=base)
    assert format is base
    export_folder(entries, config, tmp_path / "new", format=format, max_shard_bytes=9000)
    assert (tmp_path / "new" / INDEX).exists()
    before, after = read_all(old), read_all(tmp_path / "new")
    assert before.keys() == after.keys()
    assert all(same_bits(after[name], before[name]) for name in before)
    assert imported(tmp_path / "new")[0] == config
    logits = []
    for folder in (old, tmp_path / "new"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        assert type(model).__name__ == type(tiny_sources.build(case)).__name__
        tokens = torch.arange(40)[None] % 61
        logits.append(model(input_ids=tokens, use_cache=False).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_public_format_round_trip_is_bitwise(dtype: torch.dtype, tmp_path: Path) -> None:
    entries = random_entries(HYBRID, dtype)
    export_folder(entries, HYBRID, tmp_path / "a", format=Format.gla_swa)
    config, read = imported(tmp_path / "a")
    assert config == HYBRID
    for old, new in zip(entries, read, strict=True):
        assert old.name == new.name
        assert same_bits(old.load(), new.load())
    export_folder(read, config, tmp_path / "b", format=Format.gla_swa)
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_public_config_of_the_7b() -> None:
    """Values of the released config.json (spec, section 8.2)."""
    config = ModelConfig(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_attention_heads=28,
        num_key_value_heads=4, head_dim=128, mixers="[L S]*14", ffns="d*28", qkv_bias=True,
        window_tokens=4096, window_includes_self=False, bos_token_id=151643, eos_token_id=151643,
    )  # fmt: skip
    written = write_config(config, Format.gla_swa, dtype=torch.bfloat16)
    expected = {
        "architectures": ["GLAswaForCausalLM"], "model_type": "gla_swa", "hidden_size": 3584,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "intermediate_size": 18944, "vocab_size": 152064, "attn_layers": list(range(1, 28, 2)),
        "attn_mode": "chunk", "sliding_window": 4096, "rope_theta": 1e6,
        "max_position_embeddings": 131072, "norm_eps": 1e-6, "hidden_act": "swish",
        "use_short_conv": False, "conv_size": 4, "elementwise_affine": True,
        "initializer_range": 0.02, "tie_word_embeddings": False, "fuse_cross_entropy": True,
        "torch_dtype": "bfloat16", "bos_token_id": 151643, "eos_token_id": 151643,
        "gate_logit_normalizer": 16.0, "gate_low_rank_dim": 16,
    }  # fmt: skip
    assert {key: written[key] for key in expected} == expected


def test_window_of_the_public_format_counts_earlier_keys_only() -> None:
    for window, includes_self, stored in ((8, True, 7), (8, False, 8)):
        config = dataclasses.replace(
            HYBRID, window_tokens=window, window_includes_self=includes_self
        )
        written = write_config(config, Format.gla_swa, dtype=torch.float32)
        assert written["sliding_window"] == stored
        assert read_config(written) == config
        del written["synfire"]
        assert read_config(written).visible_window_tokens == config.visible_window_tokens


def plain(**changes: Any) -> ModelConfig:
    return dataclasses.replace(HYBRID, mixers="F*3", window_tokens=None, **changes)


@pytest.mark.parametrize(
    ("config", "format"),
    [
        (HYBRID, Format.gla_swa),
        (dataclasses.replace(HYBRID, mixers="L*3"), Format.gla_swa),
        (plain(), Format.qwen2),
        (plain(head_dim=16), Format.qwen2),
        (dataclasses.replace(HYBRID, mixers="F S F"), Format.qwen2),
        (dataclasses.replace(HYBRID, mixers="S*3"), Format.qwen2),
        (plain(qk_norm=True, qkv_bias=False), Format.qwen3),
        (plain(qk_norm=True, output_bias=True), Format.qwen3),
        (plain(qkv_bias=False), Format.llama),
        (plain(qkv_bias=False, ffn_bias=True), Format.llama),
        (plain(qkv_bias=False, head_dim=12, num_attention_heads=5, num_key_value_heads=5),
         Format.mistral),
        (dataclasses.replace(HYBRID, mixers="S*3", qkv_bias=False), Format.mistral),
    ],
)  # fmt: skip
def test_format_is_chosen_and_read_back(config: ModelConfig, format: Format) -> None:
    assert choose_format(config) is format
    written = write_config(config, format, dtype=torch.float32)
    found = read_config(json.loads(json.dumps(written)))
    assert found.layers == config.layers
    window = config.visible_window_tokens if "S" in config.mixers else None
    assert found.visible_window_tokens == window
    same = {"mixers": config.mixers, "window_tokens": 8, "window_includes_self": True}
    assert dataclasses.replace(found, **same) == dataclasses.replace(config, **same)


@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(theta=5e5, type=RopeType.linear, factor=2.0),
        RopeConfig(theta=5e5, type=RopeType.llama3, factor=8.0,
                   original_max_position_embeddings=64, low_freq_factor=1.5),
        RopeConfig(theta=5e5, type=RopeType.yarn, factor=4.0, truncate=False,
                   original_max_position_embeddings=64, mscale=0.7, mscale_all_dim=1.2),
        RopeConfig(theta=5e5, type=RopeType.yarn, factor=4.0, beta_fast=16.0,
                   original_max_position_embeddings=64, attention_factor=1.3),
    ],
)  # fmt: skip
def test_scaled_rope_is_written_in_both_spellings(rope: RopeConfig) -> None:
    written = write_config(plain(rope=rope), Format.qwen2, dtype=torch.float32)
    assert read_config(written).rope == rope
    old = {key: value for key, value in written.items() if key != "rope_parameters"}
    assert read_config(old).rope == rope
    new = {k: v for k, v in written.items() if k not in ("rope_scaling", "rope_theta")}
    assert read_config(new).rope == rope


def test_missing_trained_length_is_written_out() -> None:
    rope = RopeConfig(type=RopeType.llama3, factor=8.0)
    written = write_config(plain(rope=rope), Format.qwen2, dtype=torch.float32)
    assert written["rope_parameters"]["original_max_position_embeddings"] == 131072


@pytest.mark.parametrize(
    ("config", "format", "message"),
    [
        (HYBRID, Format.qwen2, r"model.mixers \(L S L\) must be only F and S in the qwen2 format"),
        (
            plain(sinks=SinkConfig(num_tokens=3)), Format.qwen2,
            r"model.sinks.num_tokens \(3\) must be 0 in the qwen2 format",
        ),
        (plain(), Format.gla_swa, r"mixers \(F\*3\) must be only L and S in the gla_swa"),
        (dataclasses.replace(HYBRID, mixers="S*3"), Format.gla_swa, "must be a pattern with L"),
        (dataclasses.replace(HYBRID, mixers="L _ S"), Format.gla_swa, "must be only L and S"),
        (dataclasses.replace(HYBRID, mixers="F S F", qkv_bias=False), Format.mistral, "only S"),
        (dataclasses.replace(HYBRID, mixers="F S F", qkv_bias=False), Format.llama, "only F"),
        (
            dataclasses.replace(HYBRID, linear=KEY_TIED), Format.gla_swa,
            r"model.linear.gate \(key_tied\) must be low_rank in the gla_swa format",
        ),
        (
            dataclasses.replace(HYBRID, linear=SIGMOID), Format.gla_swa,
            r"model.linear.feature_map \(sigmoid\) must be relu in the gla_swa format",
        ),
        (dataclasses.replace(HYBRID, mixers="L S+L S"), Format.gla_swa, "must be only L and S"),
        (plain(ffns="d d e"), Format.qwen2, r"model.ffns \(d d e\) must be only d"),
        (plain(qkv_bias=False), Format.qwen2, r"qkv_bias \(False\) must be true in the qwen2"),
        (plain(output_bias=True), Format.qwen2, r"output_bias \(True\) must be false"),
        (plain(ffn_bias=True), Format.qwen2, r"ffn_bias \(True\) must be false"),
        (plain(qk_norm=True), Format.qwen2, r"qk_norm \(True\) must be false"),
        (plain(), Format.qwen3, r"qk_norm \(False\) must be true"),
        (plain(qk_norm=True), Format.qwen3, r"output_bias \(False\) must be true"),
        (plain(qkv_bias=False, head_dim=12, num_attention_heads=5, num_key_value_heads=5),
         Format.llama, r"hidden_size \(32\) must be a multiple of num_attention_heads"),
        (dataclasses.replace(HYBRID, head_dim=16), Format.gla_swa, r"head_dim \(16\) must be hid"),
        (dataclasses.replace(HYBRID, window_tokens=1), Format.gla_swa, "must be 2 or more keys"),
        (dataclasses.replace(HYBRID, rms_norm_eps=1e-5), Format.gla_swa, "must be rms_norm_eps"),
        (dataclasses.replace(HYBRID, rope=RopeConfig(type=RopeType.linear)), Format.gla_swa,
         r"rope.type \(linear\) must be default"),
    ],
)  # fmt: skip
def test_what_a_format_cannot_say_is_refused(
    config: ModelConfig, format: Format, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_format(config, format)


@pytest.mark.parametrize("preferred", [None, Format.qwen2])
def test_a_model_that_fits_no_public_format_is_exported_in_our_own(
    preferred: Format | None,
) -> None:
    for changes in ({"mixers": "L F S"}, {"sinks": SinkConfig(num_tokens=2)}):
        config = dataclasses.replace(HYBRID, **changes)
        assert choose_format(config, preferred) is Format.synfire
    assert choose_format(HYBRID, preferred) is Format.gla_swa
    assert choose_format(HYBRID, Format.synfire) is Format.synfire


def test_spiking_is_noted_and_read_over(tmp_path: Path) -> None:
    spiking = SpikingConfig(neuron=NeuronKind.adaptive, k=2.5)
    entries = random_entries(HYBRID, torch.float32)
    export_folder(entries, HYBRID, tmp_path / "a", format=Format.gla_swa, spiking=spiking)
    written = json.loads((tmp_path / "a" / "config.json").read_text())
    assert written["synfire"]["spiking"] == {"neuron": "adaptive", "k": 2.5}
    assert read_config(written).layers == HYBRID.layers


def test_tensors_must_be_the_models(tmp_path: Path) -> None:
    entries = random_entries(HYBRID, torch.float32)
    rest = [entry for entry in entries if entry.name != "final_norm.weight"]
    more = [*entries, dataclasses.replace(entries[0], name="mystery")]
    wrong = [dataclasses.replace(entries[0], shape=(60, 32)), *entries[1:]]
    for given, message in (
        (rest, "tensor final_norm.weight must exist for mixers L S L"),
        (more, "tensor mystery must not exist"),
        (wrong, r"embedding.weight \(60, 32\) must have the shape"),
    ):
        with pytest.raises(ValueError, match=message):
            export_folder(given, HYBRID, tmp_path / "a", format=Format.gla_swa)
    assert list(tmp_path.iterdir()) == []


def test_only_older_exports_are_replaced(tmp_path: Path) -> None:
    entries = random_entries(HYBRID, torch.float32)
    out = tmp_path / "out"
    out.mkdir()
    export_folder(entries, HYBRID, out, format=Format.gla_swa)
    (out / "left_over").write_text("x")
    export_folder(entries, HYBRID, out, format=Format.gla_swa)
    assert not (out / "left_over").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "config.json").write_text("{}")
    for place in (precious, precious / "config.json"):
        with pytest.raises(ValueError, match="must be new, empty or an older export"):
            export_folder(entries, HYBRID, place, format=Format.gla_swa)
    assert (precious / "config.json").read_text() == "{}"


def test_a_failed_export_leaves_the_old_one(tmp_path: Path) -> None:
    entries = random_entries(HYBRID, torch.float32)
    export_folder(entries, HYBRID, tmp_path / "out", format=Format.gla_swa)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()

    def fail() -> torch.Tensor:
        raise OSError("disk full")

    broken = [*entries[:-1], dataclasses.replace(entries[-1], load=fail)]
    with pytest.raises(OSError, match="disk full"):
        export_folder(broken, HYBRID, tmp_path / "out", format=Format.gla_swa)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_export_that_ended_between_two_renames_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = random_entries(HYBRID, torch.float32)
    out = tmp_path / "out"
    export_folder(entries, HYBRID, out, format=Format.gla_swa)
    before = (out / "model.safetensors").read_bytes()
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == ".out.partial":
            raise OSError("the folder is gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="the folder is gone"):
        export_folder(entries, HYBRID, out, format=Format.gla_swa)
    assert (out / "model.safetensors").read_bytes() == before
    out.rename(tmp_path / ".out.replaced")  # as a killed process leaves it
    with pytest.raises(OSError, match="the folder is gone"):
        export_folder(entries, HYBRID, out, format=Format.gla_swa)
    assert (out / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_tokenizer_files_travel(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    entries = random_entries(HYBRID, torch.float32)
    export_folder(entries, HYBRID, tmp_path / "a", format=Format.gla_swa, tokenizer=tokenizer)
    assert (tmp_path / "a" / "tokenizer.json").read_text() == "{}"
