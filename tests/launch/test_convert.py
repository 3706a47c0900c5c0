"""`launch.convert` end to end: text in, checkpoint and certificate out, errors, memory."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data.prepare_corpus import prepare
from data.tokenizer import load_tokenizer
from launch.compose import compose_mapping, load_config, typed
from launch.config_errors import ConfigError
from launch.convert import convert, target_model
from launch.convert_config import ConvertConfig, UpcycleConfig
from launch.model_source import model_from_checkpoint
from launch.sample_text import SampleSizes, read_sample
from models.config import ModelConfig
from models.conversion.huggingface import copy_tokenizer, read_json
from models.conversion.new_parameters import UpcycleMode
from models.conversion.source_config import read_config
from models.expert_config import ExpertConfig
from models.mixer_config import FeatureMap, GateKind, LinearAttentionConfig
from parallel.checkpoint import read_manifest, read_tensors, tensor_dtypes, verify
from tests.data.prepared_folder import random_documents, write_folder
from tests.models.conversion import tiny_sources
from tests.models.conversion.test_huggingface import same_bits
from tests.models.exported.folders import case
from training.config import RunConfig
from training.run import run
from training.weight_source import open_weights

pytest.importorskip("transformers")
VOCABULARY = 300
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of a few invented documents."""
    root = tmp_path_factory.mktemp("text")
    (root / "raw").mkdir()
    for number in range(40):
        words = " ".join(f"word{(number * k) % 17} {k * k}" for k in range(120))
        (root / "raw" / f"{number}.txt").write_text(words)
    prepare(str(root / "raw"), root / "data", vocab_size=VOCABULARY, heldout_fraction=0.3)
    return root / "data"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A tiny Qwen2 folder with the text's tokenizer."""
    folder = tmp_path_factory.mktemp("source") / "hf"
    tiny_sources.save("qwen2", folder, vocab_size=VOCABULARY, num_hidden_layers=4)
    copy_tokenizer(text / "tokenizer", folder)
    return folder


def config(source: Path, out: Path, **changes: Any) -> ConvertConfig:
    return ConvertConfig(source=str(source), out=str(out), **changes)


def hybrid(source: Path, out: Path, **changes: Any) -> ConvertConfig:
    sizes = {"sequence_length": 32, "text_tokens": 128, "mixers": "[L S]*2", "window_tokens": 8}
    return config(source, out, **{**sizes, **changes})


def test_other_mixers_leave_the_sources_experts() -> None:
    base = case("softmax experts")
    for mixers, ffns in (("L+S L S F", base.ffns), ("L*3", "d*3")):
        assert target_model(ConvertConfig(source="a", out="b", mixers=mixers), base).ffns == ffns


def test_conversion_writes_a_verified_checkpoint(source: Path, text: Path, tmp_path: Path) -> None:
    certificate = convert(hybrid(source, tmp_path / "out", text=str(text)))
    out = tmp_path / "out"
    verify(out)
    assert json.loads((out / "certificate.json").read_text()) == certificate
    assert certificate["origins"] == {"copied": 51, "reshaped": 0, "scaled": 0, "new": 8}
    assert certificate["source"]["unused_tensors"] == []
    assert certificate["numeric"]["perplexity"]["source"] > 1
    assert len(certificate["numeric"]["linear_layers"]) == 2
    opened = open_weights(out)
    assert opened.model.layers.describe() == "mixers [L S]*2 | ffns d*4"
    assert opened.model.window_tokens == 8
    assert len(opened.new_parameters) == 8
    assert opened.tokenizer_sha256 == open_weights(source).tokenizer_sha256
    assert (out / "tokenizer" / "tokenizer.model").is_file()
    manifest = read_manifest(out)
    assert (manifest["step"], manifest["stage"], manifest["tokens"]) == (0, None, 0)
    assert "tokenizer/tokenizer.model" in manifest["files"]
    assert "certificate.json" in manifest["files"]
    stored = load_file(source / "model.safetensors")
    written = dict(read_tensors(out))
    for name, entry in certificate["tensors"].items():
        if entry["origin"] == "copied":
            assert same_bits(written[f"model/{name}"], stored[entry["source"][0]])
    norm = written["model/blocks.0.mixer.head_norm.weight"]
    assert (norm > 0).all()
    assert not torch.allclose(norm, torch.ones_like(norm))


def test_import_without_a_target_keeps_bits_and_dtype(tmp_path: Path) -> None:
    folder = tiny_sources.save("llama", tmp_path / "hf", dtype=torch.bfloat16)
    certificate = convert(config(folder, tmp_path / "out"))
    assert certificate["origins"]["copied"] == certificate["target"]["num_tensors"]
    assert certificate["numeric"] == {"skipped": True}
    stored = load_file(folder / "model.safetensors")
    assert set(tensor_dtypes(tmp_path / "out").values()) == {torch.bfloat16}
    for name, tensor in read_tensors(tmp_path / "out"):
        origin = certificate["tensors"][name.removeprefix("model/")]["source"][0]
        assert same_bits(tensor, stored[origin])


def test_text_file_is_encoded_with_the_sources_tokenizer(source: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" ".join(f"word{n % 13} {n}" for n in range(900)))
    found = convert(hybrid(source, tmp_path / "out", text=str(tmp_path / "a.txt")))
    assert found["numeric"]["tokens"] == 128


def test_alignment_is_in_the_certificate(source: Path, text: Path, tmp_path: Path) -> None:
    align = load_config("convert", ConvertConfig, [
        f"source={source}", f"out={tmp_path}", f"text={text}", "align.tokens=600",
        "align.rows_per_step=1",
    ]).align  # fmt: skip
    found = convert(hybrid(source, tmp_path / "out", text=str(text), align=align))
    assert [entry["layer"] for entry in found["alignment"]] == [0, 2]
    assert all(entry["tokens"] == 608 for entry in found["alignment"])
    assert any(entry["after"] < entry["before"] for entry in found["alignment"])


def test_numeric_part_can_be_skipped(source: Path, text: Path, tmp_path: Path) -> None:
    options = load_config("convert", ConvertConfig, [
        f"source={source}", f"out={tmp_path}", "certificate.numeric=false",
        "linear.key_bias=zero", "gate_init=64",
    ])  # fmt: skip
    assert options.options.gate_init == 64
    found = convert(hybrid(source, tmp_path / "out", text=str(text), linear=options.linear,
                           certificate=options.certificate))  # fmt: skip
    assert found["numeric"] == {"skipped": True}
    assert found["origins"]["scaled"] == 2
    notes = {entry["note"] for entry in found["tensors"].values()}
    assert any(note.startswith("RMS of the source's attention output") for note in notes)


def test_without_text_the_calibration_is_said_to_be_missing(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = convert(hybrid(source, tmp_path / "out"))
    assert "norm_init (calibrated) has no effect without sample text" in caplog.text
    assert found["tensors"]["blocks.0.mixer.head_norm.weight"]["note"] == "ones"


def test_named_model_and_changed_pattern(source: Path, tmp_path: Path) -> None:
    named = ModelConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, mixers="L*4", ffns="d*4", qkv_bias=True,
    )  # fmt: skip
    convert(config(source, tmp_path / "a", model=named))
    opened = open_weights(tmp_path / "a")
    assert opened.model.mixers == "L*4"
    convert(config(source, tmp_path / "b", model=named, mixers="L S L L", window_tokens=3,
                   window_includes_self=False))  # fmt: skip
    assert open_weights(tmp_path / "b").model.visible_window_tokens == 4


EXPERTS = ExpertConfig(num_experts=4, num_shared_experts=2)


def with_experts(source: Path, out: Path, **changes: Any) -> ConvertConfig:
    """Linear and windowed layers, two of them with experts."""
    model = dataclasses.replace(
        read_config(read_json(source / "config.json")), moe=EXPERTS, window_tokens=8
    )
    return hybrid(source, out, **{"model": model, "ffns": "d d e e", **changes})


@pytest.mark.parametrize("mode", list(UpcycleMode))
def test_upcycling_writes_copies_that_train(
    source: Path, text: Path, tmp_path: Path, mode: UpcycleMode, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="launch.convert")
    std = None if mode is UpcycleMode.exact else 0.3
    options = UpcycleConfig(mode=mode, router_std=std)
    found = convert(with_experts(source, tmp_path / "out", text=str(text), upcycle=options))
    verify(tmp_path / "out")
    assert found["unexplained_tensors"] == found["source"]["unused_tensors"] == []
    assert found["options"]["upcycle"] == mode.value
    ratios = found["numeric"]["expert_layers"]
    assert [entry["layer"] for entry in ratios] == [2, 3]
    near = {UpcycleMode.exact: 1e-6, UpcycleMode.measured: 0.05, UpcycleMode.paper: 0.2}[mode]
    assert all(abs(entry["output_ratio_mean"] - 1) < near for entry in ratios)
    assert "layer 3: experts put out" in caplog.text
    written = {name.removeprefix("model/"): value for name, value in read_tensors(tmp_path / "out")}
    opened = open_weights(tmp_path / "out")
    assert opened.model.layers.describe() == "mixers [L S]*2 | ffns d*2 e*2"
    assert {name for name in opened.new_parameters if ".ffn." in name} == {
        "blocks.2.ffn.router.weight", "blocks.3.ffn.router.weight",
    }  # fmt: skip
    experts = written["blocks.3.ffn.experts.down_proj.weight"]
    shared = written["blocks.3.ffn.shared.down_proj.weight"]
    assert all(same_bits(part, experts[0]) for part in (*experts, *shared.chunk(2, dim=1)))
    first_loss = train_one_step(tmp_path, text)
    assert first_loss == pytest.approx(found["numeric"]["loss"]["target"], rel=0.2)


def train_one_step(folder: Path, text: Path) -> float:
    """The loss of one step of `launch.train` from the checkpoint in `folder / "out"`."""
    run_dir = folder / "run"
    overrides = [
        "experiment=smoke", "model=from_checkpoint", f"init.checkpoint={folder / 'out'}",
        f"data.path={text}", "backend=cpu", f"run_dir={run_dir}", "training.max_steps=1",
        "training.precision=fp32", "spiking=off",
    ]  # fmt: skip
    mapping = compose_mapping("train", RunConfig, overrides)
    run(typed(mapping, RunConfig, model_from_checkpoint))
    (row,) = (json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines())
    return float(row["loss"])


def test_branches_sinks_and_experts_of_a_preset_train(
    source: Path, text: Path, tmp_path: Path
) -> None:
    """The quickstart's second target at the source's sizes, from conversion to a step."""
    preset = load_config("convert", ConvertConfig, [
        f"source={source}", f"out={tmp_path / 'out'}", "model=spikingbrain_nano_moe",
        f"model.vocab_size={VOCABULARY}", "model.hidden_size=32", "model.intermediate_size=48",
        "model.head_dim=8", "model.tie_word_embeddings=false", "model.bos_token_id=1",
        "model.sinks.init=bos", f"text={text}", "text_tokens=256", "sequence_length=64",
    ])  # fmt: skip
    found = convert(preset)
    assert found["target"]["pattern"] == "mixers L+S*3 L+F | ffns [d e]*2"
    assert found["unexplained_tensors"] == found["source"]["unused_tensors"] == []
    assert [entry["layer"] for entry in found["numeric"]["linear_layers"]] == [0, 1, 2, 3]
    for entry in found["numeric"]["expert_layers"]:
        assert entry["output_ratio_mean"] == pytest.approx(1, abs=1e-6)
    numbers = found["numeric"]["perplexity"]
    assert numbers["target"] < 2 * numbers["source"]
    loss = train_one_step(tmp_path, text)
    assert loss == pytest.approx(found["numeric"]["loss"]["target"], rel=0.2)


def test_ffns_are_kept_where_only_mixers_change(source: Path, tmp_path: Path) -> None:
    target = target_model(with_experts(source, tmp_path, ffns=None), ModelConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, mixers="F*4", ffns="d*4",
    ))  # fmt: skip
    assert (target.mixers, target.ffns) == ("[L S]*2", "d*4")
    named = dataclasses.replace(target, ffns="e d e d")
    assert target_model(hybrid(source, tmp_path, model=named), target).ffns == "e d e d"
    assert target_model(config(source, tmp_path, ffns="d e d d"), target).ffns == "d e d d"


def test_a_half_life_without_gates_is_said_to_have_no_effect(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    linear = LinearAttentionConfig(feature_map=FeatureMap.sigmoid, gate=GateKind.key_tied)
    base = read_config(read_json(source / "config.json"))
    convert(hybrid(source, tmp_path / "out", model=dataclasses.replace(base, linear=linear),
                   gate_init=64))  # fmt: skip
    assert caplog.text.count("gate_init") == 1


def test_upcycling_without_experts_is_said_to_have_no_effect(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    convert(hybrid(source, tmp_path / "out", upcycle=UpcycleConfig(mode=UpcycleMode.paper)))
    assert "upcycle has no effect: no layer becomes e" in caplog.text


def test_conversion_is_reproducible(source: Path, text: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        convert(hybrid(source, tmp_path / name, text=str(text)))
    first, second = (dict(read_tensors(tmp_path / name)) for name in ("a", "b"))
    assert all(same_bits(first[name], second[name]) for name in first)
    files = [(tmp_path / name / "certificate.json").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixers": "[L S]*3"}, r"num_hidden_layers \(6\) must equal the source's: got 4"),
        ({"mixers": "[L S]*2", "window_tokens": None}, r"window_tokens \(None\) must be at least"),
        ({"mixers": "[L X]*2"}, "must use F, S, L"),
        ({"gate_init": 0.1}, "gate_init .* half-life of 1 to"),
        ({"text": "/no/such/place"}, "must be a prepared folder or a text file: got neither"),
    ],
)
def test_what_cannot_be_converted_writes_nothing(
    source: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        convert(hybrid(source, tmp_path / "out", **changes))
    assert list(tmp_path.iterdir()) == []


def test_text_of_another_tokenizer_is_refused(source: Path, text: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "data", random_documents(9), heldout=random_documents(9))
    with pytest.raises(ValueError, match="must be prepared with the source's tokenizer: got"):
        convert(hybrid(source, tmp_path / "out", text=str(tmp_path / "data")))
    bare = tmp_path / "bare"
    shutil.copytree(source, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(ValueError, match="no tokenizer.json or tokenizer.model to encode"):
        convert(hybrid(bare, tmp_path / "out", text=str(source / "config.json")))
    convert(hybrid(bare, tmp_path / "out", text=str(text)))
    assert read_manifest(tmp_path / "out")["tokenizer"] is None


def test_only_older_checkpoints_are_replaced(source: Path, tmp_path: Path) -> None:
    for _ in range(2):
        convert(config(source, tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for place in (source, source / "config.json"):
        with pytest.raises(ValueError, match="must be new, empty or an older checkpoint"):
            convert(config(source, place))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["align.tokens=5"], r"align.tokens \(5\) must be 0 without sample text"),
        (["linear.key_bias=centre"], r"key_bias \(centre\) must have sample text"),
        (["align.tokens=-1", "text=x"], r"align.tokens \(-1\) must be at least 0"),
        (["align.learning_rate=0", "text=x"], "learning_rate .* must be above 0"),
        (["text_tokens=0"], r"text_tokens \(0\) must be at least 1"),
        (["linear.key_bias=drop"], "key_bias .* must be one of keep, zero or centre"),
        (["upcycle.mode=measured"], r"upcycle.mode \(measured\) must have sample text"),
        (["upcycle.mode=paper", "upcycle.router_std=0"], r"router_std \(0.0\) must be above 0"),
        (["upcycle.router_std=0.1"], r"router_std \(0.1\) has no effect with .*mode exact"),
        (["upcycle.mode=random"], "mode .* must be one of exact, measured or paper"),
        (["linear.keybias=zero"], "Did you mean .*linear.key_bias"),
    ],
)
def test_impossible_settings_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("convert", ConvertConfig, ["source=a", "out=b", *overrides])


def test_sample_text_parts(source: Path, text: Path, tmp_path: Path) -> None:
    sizes = SampleSizes(sequence_length=16, tokens=64, align_tokens=70)
    tokenizer = load_tokenizer(source)
    parts = read_sample(text, sizes, tokenizer=tokenizer, seed=1)
    assert parts.alignment is not None
    assert parts.calibration.tokens.shape == parts.evaluation.tokens.shape == (4, 16)
    assert parts.alignment.tokens.shape == (5, 16)
    found = {tuple(row) for row in parts.calibration.tokens.tolist()}
    assert found.isdisjoint(tuple(row) for row in parts.alignment.tokens.tolist())
    assert not torch.equal(parts.calibration.tokens, parts.evaluation.tokens)
    path = tmp_path / "a.txt"
    path.write_text(" ".join(str(number) for number in range(400)))
    ids = tokenizer.encode(path.read_text())
    parts = read_sample(path, sizes, tokenizer=tokenizer, seed=1)
    assert parts.alignment is not None
    assert parts.calibration.tokens.flatten().tolist() == ids[:64]
    assert parts.calibration.labels.flatten().tolist() == ids[1:65]
    assert parts.alignment.tokens.flatten().tolist() == ids[64:144]
    assert parts.alignment.labels.flatten().tolist() == ids[65:145]
    rows = (len(ids) - 1) // 16
    assert parts.evaluation.tokens.flatten().tolist() == ids[(rows - 4) * 16 : rows * 16]
    assert parts.evaluation.labels.flatten().tolist() == ids[(rows - 4) * 16 + 1 : rows * 16 + 1]
    path.write_text("short")
    with pytest.raises(ValueError, match="must give two rows: got sequence_length 16"):
        read_sample(path, sizes, tokenizer=tokenizer, seed=1)


def test_short_text_is_shared_out_with_a_warning(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = load_tokenizer(source)
    (tmp_path / "a.txt").write_text(" ".join(str(number) for number in range(60)))
    sizes = SampleSizes(sequence_length=16, tokens=1600, align_tokens=0)
    parts = read_sample(tmp_path / "a.txt", sizes, tokenizer=tokenizer, seed=1)
    assert 1 <= parts.evaluation.num_rows <= parts.calibration.num_rows
    assert "fitting on" in caplog.text


def test_short_text_keeps_fitting_and_aligning_apart(source: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(source)
    (tmp_path / "a.txt").write_text(" ".join(str(number) for number in range(60)))
    ids = tokenizer.encode((tmp_path / "a.txt").read_text())
    found = (len(ids) - 1) // 16
    sizes = SampleSizes(sequence_length=16, tokens=1600, align_tokens=1600)
    parts = read_sample(tmp_path / "a.txt", sizes, tokenizer=tokenizer, seed=1)
    assert parts.alignment is not None
    rows = [part.tokens for part in (parts.calibration, parts.alignment, parts.evaluation)]
    assert torch.cat(rows).flatten().tolist() == ids[: found * 16]
    assert all(len(part) > 0 for part in rows)
    (tmp_path / "a.txt").write_text(" ".join(str(number) for number in range(24)))
    with pytest.raises(ValueError, match="must give three rows to align on"):
        read_sample(tmp_path / "a.txt", sizes, tokenizer=tokenizer, seed=1)


def test_what_only_new_linear_layers_read_is_said_to_have_no_effect(
    source: Path, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = load_config("convert", ConvertConfig, [
        f"source={source}", f"out={tmp_path / 'out'}", f"text={text}", "text_tokens=64",
        "sequence_length=32", "align.tokens=64", "gate_init=64", "certificate.numeric=false",
        "linear.key_bias=zero",
    ])  # fmt: skip
    convert(options)
    named = [m.split(" has no effect")[0] for m in caplog.messages if "no layer becomes L" in m]
    assert named == ["align.tokens", "gate_init", "linear.key_bias"]


def test_a_prepared_folder_is_not_written_over(source: Path, text: Path) -> None:
    with pytest.raises(ValueError, match=r"out .* must be new, empty or an older checkpoint"):
        convert(config(source, text))


def test_the_same_conversion_has_the_same_fingerprint(source: Path, tmp_path: Path) -> None:
    prints = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        convert(hybrid(source, tmp_path / name, seed=seed))
        prints.append(open_weights(tmp_path / name).fingerprint())
    assert prints[0] == prints[1] != prints[2]
    manifest = read_manifest(tmp_path / "a")
    for name, is_same in (("certificate.json", True), ("__0_0.distcp", False)):
        manifest["files"][name]["sha256"] = "0" * 64
        (tmp_path / "a" / "manifest.json").write_text(json.dumps(manifest))
        found = open_weights(tmp_path / "a", check_files=False).fingerprint()
        assert (found == prints[0]) is is_same


@pytest.mark.slow
def test_command_line(source: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "launch.convert", *arguments]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)

    done = run(f"source={source}", f"out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    assert "51 copied, 0 unused source tensors" in done.stderr
    wrong = run(f"source={tmp_path / 'nowhere'}", f"out={tmp_path / 'b'}")
    assert wrong.returncode == 1
    assert "must hold config.json" in wrong.stderr
    assert "Traceback" not in wrong.stderr
