from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from models.config import ModelConfig
from models.conversion.attention_transfer import (
    AlignmentOptions,
    check_key_bias,
    fit_new_parameters,
)
from models.conversion.block_stream import SampleRows
from models.conversion.convert import plan_conversion
from models.conversion.huggingface import SafetensorsFolder
from models.conversion.new_parameters import ConversionOptions, KeyBias, NormInit
from models.conversion.source_config import read_config
from models.model import Model
from models.sequence import SequenceContext
from tests.models.conversion import tiny_sources
from tests.support.closeness import assert_close

pytest.importorskip("transformers")

ROWS, TOKENS = 3, 24


def rows(seed: int = 1, *, num_rows: int = ROWS, boundary: int | None = None) -> SampleRows:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 61, (num_rows, TOKENS + 1), generator=generator)
    documents = torch.zeros(num_rows, TOKENS, dtype=torch.int64)
    if boundary is not None:
        documents[:, boundary:] = 1
    return SampleRows(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), documents)


def source_of(folder: Path, case: str = "qwen2") -> tuple[SafetensorsFolder, ModelConfig]:
    source = SafetensorsFolder(tiny_sources.save(case, folder, dtype=torch.float64))
    return source, read_config(source.config)


def full_model(source: SafetensorsFolder, target: ModelConfig, **planning: object) -> Model:
    model = Model(target)
    plan = plan_conversion(source, target, **planning)  # type: ignore[arg-type]
    model.load_state_dict({t.name: t.load().clone() for t in plan}, assign=True)
    return model.double()


@pytest.mark.parametrize("case", ["qwen2", "qwen3", "mistral"])
def test_head_norm_is_the_rms_of_the_sources_attention_output(case: str, tmp_path: Path) -> None:
    """Against transformers' own attention outputs, per head channel over heads, rows and tokens."""
    source, config = source_of(tmp_path / "hf", case)
    window = config.window_tokens or 4
    target = dataclasses.replace(config, mixers="S L L", window_tokens=window)
    if case != "mistral":
        target = dataclasses.replace(target, mixers="F L L")
    sample = rows()
    fitted = fit_new_parameters(source, target, ConversionOptions(), sample)
    assert sorted(fitted.values) == [f"blocks.{i}.mixer.head_norm.weight" for i in (1, 2)]
    hf = tiny_sources.exact(tiny_sources.build(case, dtype=torch.float64), rotary=True)
    seen: dict[int, torch.Tensor] = {}
    for index, layer in enumerate(hf.model.layers):
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _module, args, index=index: seen.__setitem__(index, args[0])
        )
    hf(input_ids=sample.tokens, use_cache=False)
    for index in (1, 2):
        heads = seen[index].view(-1, config.num_attention_heads, config.head_dim)
        value, note = fitted.values[f"blocks.{index}.mixer.head_norm.weight"]
        assert_close(value, heads.square().mean(dim=(0, 1)).sqrt(), relative=1e-9)
        assert f"on {ROWS * TOKENS} tokens" in note


def test_calibrated_output_has_the_sources_scale(tmp_path: Path) -> None:
    source, config = source_of(tmp_path / "hf")
    target = dataclasses.replace(config, mixers="L F F")
    sample = rows()
    fitted = fit_new_parameters(source, target, ConversionOptions(), sample)
    sequence = SequenceContext.one_document_per_row(ROWS, TOKENS)
    outputs = []
    for model in (
        full_model(source, config),
        full_model(source, target, fitted=fitted.values),
        full_model(source, target),
    ):
        block = model.blocks[0]
        x = block.mixer_norm(model.embedding(sample.tokens))  # type: ignore[union-attr,operator]
        (heads,) = block.mixer.attend(x, sequence)  # type: ignore[union-attr,operator]
        if model.config.mixers.startswith("L"):
            heads = block.mixer.head_norm(heads)  # type: ignore[union-attr,operator]
        outputs.append(float(heads.detach().square().mean().sqrt()))
    assert outputs[1] == pytest.approx(outputs[0], rel=0.15)
    assert outputs[2] == pytest.approx(1.0, rel=0.05)


def test_documents_do_not_see_each_other(tmp_path: Path) -> None:
    source, config = source_of(tmp_path / "hf")
    target = dataclasses.replace(config, mixers="F F L")
    packed = rows(boundary=10)
    first = SampleRows(*(t[:, :10].clone() for t in (packed.tokens, packed.labels, packed.tokens)))
    first = dataclasses.replace(first, document_ids=torch.zeros_like(first.tokens))
    second = SampleRows(*(t[:, 10:].clone() for t in (packed.tokens, packed.labels, packed.tokens)))
    second = dataclasses.replace(second, document_ids=torch.zeros_like(second.tokens))
    name = "blocks.2.mixer.head_norm.weight"
    whole, a, b = (
        fit_new_parameters(source, target, ConversionOptions(), part).values[name][0].square()
        for part in (packed, first, second)
    )
    assert_close(whole, (a * 10 + b * 14) / 24, relative=1e-12)


def test_centred_keys_are_zero_on_average(tmp_path: Path) -> None:
    source, config = source_of(tmp_path / "hf")
    target = dataclasses.replace(config, mixers="F F L")
    options = ConversionOptions(key_bias=KeyBias.centre, norm_init=NormInit.ones)
    sample = rows()
    fitted = fit_new_parameters(source, target, options, sample)
    assert list(fitted.values) == ["blocks.2.mixer.k_proj.bias"]
    model = full_model(source, target, options=options, fitted=fitted.values)
    seen: list[torch.Tensor] = []
    model.blocks[2].mixer.k_proj.register_forward_hook(  # type: ignore[union-attr,operator]
        lambda _module, _args, out: seen.append(out.detach())
    )
    model(sample.tokens, SequenceContext.one_document_per_row(ROWS, TOKENS))
    assert float(seen[0].mean(dim=(0, 1)).abs().max()) < 1e-12
    assert float(seen[0].abs().mean()) > 0.1


def test_centre_needs_a_bias_that_acts_alone() -> None:
    raw = {"model_type": "llama", **tiny_sources.SIZES}
    options = ConversionOptions(key_bias=KeyBias.centre)
    with pytest.raises(ValueError, match=r"\(centre\) must have a model with a k/v/q bias"):
        check_key_bias(read_config(raw), options)
    qwen3 = read_config({**raw, "model_type": "qwen3", "attention_bias": True})
    with pytest.raises(ValueError, match=r"\(centre\) must have .* no q/k norm behind it"):
        check_key_bias(qwen3, options)
    check_key_bias(read_config({**raw, "model_type": "qwen2"}), options)


def test_zero_without_a_bias_is_said(caplog: pytest.LogCaptureFixture) -> None:
    raw = {"model_type": "llama", **tiny_sources.SIZES}
    check_key_bias(read_config(raw), ConversionOptions(key_bias=KeyBias.zero))
    assert "has no effect" in caplog.text


def test_alignment_lowers_the_error_and_moves_only_new_parameters(tmp_path: Path) -> None:
    source, config = source_of(tmp_path / "hf")
    target = dataclasses.replace(config, mixers="L F L")
    how = AlignmentOptions(learning_rate=0.02, rows_per_step=2, epochs=3)
    sample, text = rows(1), rows(2, num_rows=31)
    fitted = fit_new_parameters(source, target, ConversionOptions(), sample, alignment=(how, text))
    names = {"gate_down.weight", "gate_up.weight", "gate_up.bias", "head_norm.weight"}
    assert {name.partition(".mixer.")[2] for name in fitted.values} == names
    assert [entry["layer"] for entry in fitted.alignment] == [0, 2]
    for entry in fitted.alignment:
        assert entry["kept"]
        assert entry["after"] < 0.97 * entry["before"]
        assert entry["tokens"] == 3 * 31 * TOKENS
    # The errors are those of the mixers' outputs on the source's own hidden states.
    teacher = full_model(source, config)
    for planned, key in ((None, "before"), (fitted.values, "after")):
        start = fit_new_parameters(source, target, ConversionOptions(), sample).values
        student = full_model(source, target, fitted=planned or start)
        sequence = SequenceContext.one_document_per_row(ROWS, TOKENS)
        x = teacher.embedding(sample.tokens)
        for index in range(3):
            if index == 2:
                normed = teacher.blocks[2].mixer_norm(x)  # type: ignore[operator]
                wanted = teacher.blocks[2].mixer(normed, sequence)  # type: ignore[operator]
                got = student.blocks[2].mixer(normed, sequence)  # type: ignore[operator]
                error = float(((got - wanted).norm() / wanted.norm()).detach())
                assert fitted.alignment[1][key] == pytest.approx(error, rel=1e-6)
            x = teacher.blocks[index](x, sequence)


def test_alignment_that_hurts_is_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, config = source_of(tmp_path / "hf")
    target = dataclasses.replace(config, mixers="L F F")
    how = AlignmentOptions(learning_rate=1e3)
    fitted = fit_new_parameters(
        source, target, ConversionOptions(), rows(), alignment=(how, rows(2))
    )
    assert not fitted.alignment[0]["kept"]
    assert list(fitted.values) == ["blocks.0.mixer.head_norm.weight"]
    assert "calibrat" not in caplog.text
    assert "kept its start" in caplog.text


def test_progress_is_told(tmp_path: Path) -> None:
    source, config = source_of(tmp_path / "hf")
    told: list[tuple[str, int, int]] = []
    fit_new_parameters(
        source, dataclasses.replace(config, mixers="L F F"), ConversionOptions(), rows(),
        progress=lambda *what: told.append(what),
    )  # fmt: skip
    assert told == [("calibrate", done, 3) for done in (1, 2, 3)]
