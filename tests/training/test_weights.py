"""Every weight is accounted for: loaded, new or unused, by name and shape."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.config import ModelConfig
from models.initialisation import tensor_for
from models.layouts import is_new_parameter, parameter_layouts, parameter_shapes
from parallel.boxes import Box, LazyTensor
from parallel.checkpoint import CheckpointError, save_streamed, step_directory
from training.config import InitConfig
from training.weight_source import kept_checkpoint, open_weights
from training.weights import (
    check_same_tokenizer,
    load_weights,
    match_weights,
    warn_of_differences,
)


def model_config(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "vocab_size": 40, "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 4, "mixers": "L S", "ffns": "d*2",
        "window_tokens": 4, "qkv_bias": True,
    }  # fmt: skip
    return ModelConfig(**(values | changes))


def whole(boxes: dict[str, Box]) -> dict[str, tuple[int, ...]]:
    return {name: box.global_shape for name, box in boxes.items()}


def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return parameter_shapes(config)


def plain_mapping(config: ModelConfig) -> dict[str, Any]:
    from pydantic import TypeAdapter

    mapping: dict[str, Any] = TypeAdapter(ModelConfig).dump_python(config, mode="json")
    return mapping


def tensors_of(config: ModelConfig, seed: int = 1) -> dict[str, Tensor]:
    return {
        name: tensor_for(name, layout, config, seed)
        for name, layout in parameter_layouts(config).items()
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A run folder with one checkpoint that conversion could have written."""
    config = model_config()
    lazy = [
        LazyTensor(f"model/{name}", tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)
        for name, tensor in tensors_of(config).items()
    ]
    manifest = {
        "model": plain_mapping(config),
        "new_parameters": [name for name in shapes_of(config) if is_new_parameter(name)],
        "tokenizer": {"sha256": "a" * 64, "vocab_size": 40, "eos_token_id": 0},
    }
    save_streamed(step_directory(tmp_path / "run", 3), lazy, manifest)
    return tmp_path / "run"


def boxes_of(config: ModelConfig) -> dict[str, Box]:
    return {
        name: Box.whole(torch.full(shape, float("nan"), dtype=torch.float64))
        for name, shape in shapes_of(config).items()
    }


@pytest.mark.parametrize("inner", ["", "checkpoints/step_00000003"])
def test_a_run_folder_and_one_checkpoint_are_the_same_source(source: Path, inner: str) -> None:
    found = open_weights(source / inner)
    assert found.path == step_directory(source, 3)
    assert found.model == model_config()
    assert dict(found.shapes) == shapes_of(model_config())
    assert found.tokenizer_sha256 == "a" * 64
    assert found.tokenizer_folder is None
    assert "blocks.0.mixer.gate_up.bias" in found.new_parameters


def test_every_box_is_filled_from_the_source_in_its_own_dtype(source: Path) -> None:
    boxes = boxes_of(model_config())
    report = load_weights(boxes, whole(boxes), open_weights(source), InitConfig())
    for name, expected in tensors_of(model_config()).items():
        assert torch.equal(boxes[name].local, expected.double()), name
    assert report.describe() == f"{len(boxes)} loaded, 0 new, 0 unused"


def test_a_pipeline_rank_fills_what_it_has(source: Path) -> None:
    """Names of other stages are neither new nor unused."""
    boxes = boxes_of(model_config())
    shapes = whole(boxes)
    name = "blocks.1.ffn.up_proj.weight"
    mine = {name: boxes[name]}
    report = load_weights(mine, shapes, open_weights(source), InitConfig())
    assert torch.equal(mine[name].local, tensors_of(model_config())[name].double())
    assert report.describe() == f"{len(boxes)} loaded, 0 new, 0 unused"


def test_a_shape_mismatch_names_the_key_and_both_shapes(source: Path) -> None:
    shapes = shapes_of(model_config(intermediate_size=16))
    message = r"blocks\.0\.ffn\.gate_proj\.weight \(12, 8\) of .* got \(16, 8\)\. Choose the model="
    with pytest.raises(ValueError, match=message):
        match_weights(shapes, open_weights(source), InitConfig())


def test_an_unexplained_new_name_is_an_error_and_an_explained_one_keeps_its_value(
    source: Path,
) -> None:
    config = model_config(mixers="L L")
    found = open_weights(source)
    message = r"init\.new \(\[\]\) must explain .* got blocks\.1\.mixer\.gate_down\.weight, .*and 1"
    with pytest.raises(ValueError, match=message):
        match_weights(shapes_of(config), found, InitConfig())
    boxes = boxes_of(config)
    report = load_weights(boxes, whole(boxes), found, InitConfig(new=["blocks.1.mixer.*"]))
    assert report.new == tuple(
        f"blocks.1.mixer.{name}"
        for name in ("gate_down.weight", "gate_up.weight", "gate_up.bias", "head_norm.weight")
    )
    for name, box in boxes.items():
        assert bool(box.local.isnan().any()) is (name in report.new), name
    assert "4 new (blocks.1.mixer.gate_down.weight, " in report.describe()


def test_an_unexplained_unused_name_is_an_error(source: Path) -> None:
    config = model_config(tie_word_embeddings=True)
    found = open_weights(source)
    with pytest.raises(ValueError, match=r"init\.unused \(\[\]\) must explain .* got head\.weight"):
        match_weights(shapes_of(config), found, InitConfig())
    report = match_weights(shapes_of(config), found, InitConfig(unused=["head.*"]))
    assert report.unused == ("head.weight",)


def test_differences_that_no_shape_shows_are_warnings(
    source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = warn_of_differences(
        model_config(window_tokens=3, max_position_embeddings=9), open_weights(source)
    )
    assert len(lines) == 1
    assert "model.window_tokens (3) is 4 in" in caplog.text


def test_other_token_ids_are_refused_and_unknown_ones_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    check_same_tokenizer("there", "a" * 64, "a" * 64)
    with pytest.raises(ValueError, match=r"sha256 bbbbbbbbbbbb\) must be the .*: got aaaaaaaaaaaa"):
        check_same_tokenizer("there", "a" * 64, "b" * 64)
    assert not caplog.messages
    with caplog.at_level(logging.WARNING):
        check_same_tokenizer("there", None, "b" * 64)
    assert caplog.messages == [
        "there has no tokenizer: nobody can check that the data was encoded for it."
    ]


def test_what_is_no_checkpoint_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^checkpoint \(.*\) must be a folder: got nothing there"):
        open_weights(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError, match=r"^a\.key \(.*\) must be a run folder \(checkpoints/\), a"
    ):
        open_weights(tmp_path / "empty", key="a.key")
    (tmp_path / "young" / "checkpoints").mkdir(parents=True)
    with pytest.raises(
        ValueError, match=r"^a\.key \(.*\) must hold a complete checkpoint: got none"
    ):
        open_weights(tmp_path / "young", key="a.key")


def test_a_checkpoint_is_known_again_by_its_weights(source: Path, tmp_path: Path) -> None:
    """Wherever the run folder lies now, and whatever it is called there."""
    identity = open_weights(source).identity()
    source.rename(tmp_path / "moved")
    assert kept_checkpoint(tmp_path / "moved", identity) == step_directory(tmp_path / "moved", 3)
    other = identity | {"fingerprint": "0" * 64}
    assert kept_checkpoint(tmp_path / "moved", other) is None
    assert kept_checkpoint(source, identity) is None


def test_a_checkpoint_without_a_model_is_refused(source: Path) -> None:
    path = step_directory(source, 3) / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["model"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"its manifest\.json has no model"):
        open_weights(source)


def test_a_prepared_folder_is_not_taken_for_a_checkpoint(data: Path) -> None:
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        open_weights(data)


def test_a_hugging_face_folder_is_a_source_without_a_manifest(tmp_path: Path, data: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=40, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False,
        )
    )  # fmt: skip
    model.save_pretrained(tmp_path / "hf")
    found = open_weights(tmp_path / "hf")
    assert found.manifest is None
    assert found.tokenizer_sha256 is None
    assert found.model.mixers.replace(" ", "").startswith("F")
    boxes = boxes_of(found.model)
    load_weights(boxes, whole(boxes), found, InitConfig())
    expected = model.model.layers[1].self_attn.k_proj.bias.double()
    assert torch.equal(boxes["blocks.1.mixer.k_proj.bias"].local, expected)
    assert not any(box.local.isnan().any() for box in boxes.values())
    shutil.copy(data / "tokenizer" / "tokenizer.model", tmp_path / "hf")
    shutil.copy(data / "tokenizer" / "tokenizer_config.json", tmp_path / "hf")
    assert open_weights(tmp_path / "hf").tokenizer_sha256 is not None
