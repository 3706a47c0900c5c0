"""A Transformer's mixers as parallel branches: origins, norms that fit, refusals."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from models.config import ModelConfig
from models.conversion.attention_transfer import (
    AlignmentOptions,
    check_key_bias,
    fit_new_parameters,
)
from models.conversion.certificate import build_certificate, compare_numerically
from models.conversion.convert import plan_conversion, unused_tensors
from models.conversion.huggingface import SafetensorsFolder
from models.conversion.new_parameters import ConversionOptions, KeyBias, NormInit
from models.conversion.source_checks import check_target
from models.conversion.source_config import read_config
from models.conversion.target_tensor import OriginKind
from models.mixer_config import (
    BranchConfig,
    BranchMerge,
    BranchNorm,
    BranchProjections,
    FeatureMap,
    GateKind,
    LinearAttentionConfig,
)
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

KEY_TIED = LinearAttentionConfig(feature_map=FeatureMap.sigmoid, gate=GateKind.key_tied)


def branched(config: ModelConfig, mixers: str = "L+S F F+S", **branches: Any) -> ModelConfig:
    """`config` with parallel branches and a key-tied gate."""
    return dataclasses.replace(
        config, mixers=mixers, window_tokens=6, linear=KEY_TIED, branches=BranchConfig(**branches)
    )


def mixer_outputs(model: Model, teacher: Model, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What both mixers of a layer make of the teacher's stream."""
    sample = rows()
    sequence = SequenceContext.one_document_per_row(ROWS, TOKENS)
    with torch.no_grad():
        x = teacher.embedding(sample.tokens)  # type: ignore[misc]
        for before in range(layer):
            x = teacher.blocks[before](x, sequence)
        normed = teacher.blocks[layer].mixer_norm(x)  # type: ignore[misc]
        student_mixer, teacher_mixer = model.blocks[layer].mixer, teacher.blocks[layer].mixer
        assert student_mixer is not None
        assert teacher_mixer is not None
        return student_mixer(normed, sequence), teacher_mixer(normed, sequence)


@pytest.mark.parametrize("projections", list(BranchProjections))
@pytest.mark.parametrize("case", ["qwen2", "qwen3"])
def test_projections_of_branches_are_the_sources(
    projections: BranchProjections, case: str, tmp_path: Path
) -> None:
    source, config = source_of(tmp_path / "hf", case)
    target = branched(config, projections=projections, merge=BranchMerge.learned)
    plan = plan_conversion(source, target)
    assert unused_tensors(source, plan) == []
    assert {tensor.name for tensor in plan} == {
        name for name, _ in Model(target).named_parameters()
    }
    found = build_certificate(source, target, ConversionOptions(), plan)
    assert found["unexplained_tensors"] == []
    uses = 1 if projections is BranchProjections.shared else 2
    for kind in ("q_proj", "k_proj", "v_proj", "o_proj", *(["q_norm"] if case == "qwen3" else [])):
        known = f"model.layers.0.self_attn.{kind}.weight"
        copies = [tensor for tensor in plan if tensor.origin.sources == (known,)]
        assert len(copies) == uses
        assert all(torch.equal(tensor.load(), source.load(known)) for tensor in copies)
        assert all(tensor.origin.kind is OriginKind.copied for tensor in copies)
    new = {tensor.name: tensor for tensor in plan if tensor.origin.kind is OriginKind.new}
    assert new.keys() == {
        "blocks.0.mixer.linear.head_norm.weight", "blocks.0.mixer.sliding_window.head_norm.weight",
        "blocks.0.mixer.merge.weight", "blocks.2.mixer.full.head_norm.weight",
        "blocks.2.mixer.sliding_window.head_norm.weight", "blocks.2.mixer.merge.weight",
    }  # fmt: skip
    assert all((tensor.load() == 1).all() for tensor in new.values())
    assert all(tensor.load().shape == tensor.shape for tensor in new.values())


def test_low_rank_gates_of_branches_start_as_those_of_layers(tmp_path: Path) -> None:
    source, config = source_of(tmp_path / "hf")
    target = dataclasses.replace(branched(config), linear=config.linear)
    by_name = {t.name: t for t in plan_conversion(source, target, ConversionOptions(gate_init=64))}
    assert by_name["blocks.0.mixer.linear.gate_down.weight"].origin.note == "Xavier-uniform"
    assert not by_name["blocks.0.mixer.linear.gate_up.weight"].load().any()
    assert (by_name["blocks.0.mixer.linear.gate_up.bias"].load() > 1).all()


BRANCHES = list(itertools.product(BranchMerge, BranchProjections, BranchNorm))


@pytest.mark.parametrize(("merge", "projections", "norm"), BRANCHES)
def test_merged_output_comes_close_to_the_sources(
    merge: BranchMerge, projections: BranchProjections, norm: BranchNorm, tmp_path: Path
) -> None:
    """At step 0, against norms at one, and no worse than the best single branch."""
    source, config = source_of(tmp_path / "hf")
    target = branched(config, merge=merge, projections=projections, norm=norm)
    fitted = fit_new_parameters(source, target, ConversionOptions(), rows())
    teacher = full_model(source, config)
    calibrated = full_model(source, target, fitted=fitted.values)
    plain = full_model(source, target)
    for layer, limit in ((0, 0.75), (2, 0.6)):
        errors = []
        for model in (calibrated, plain):
            got, wanted = mixer_outputs(model, teacher, layer)
            errors.append(float((got - wanted).norm() / wanted.norm()))
        assert errors[0] < limit
        assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("norm", list(BranchNorm))
def test_norms_are_the_least_squares_of_the_sources_output(
    norm: BranchNorm, tmp_path: Path
) -> None:
    """No other pair of weights of a channel is closer: the gradient there is zero."""
    source, config = source_of(tmp_path / "hf")
    target = branched(config, norm=norm, merge=BranchMerge.mean)
    fitted = fit_new_parameters(source, target, ConversionOptions(), rows())
    model, teacher = full_model(source, target, fitted=fitted.values), full_model(source, config)
    sequence = SequenceContext.one_document_per_row(ROWS, TOKENS)
    x = teacher.blocks[0].mixer_norm(teacher.embedding(rows().tokens))  # type: ignore[misc]
    mixer, wanted = model.blocks[0].mixer, teacher.blocks[0].mixer
    assert mixer is not None
    assert wanted is not None
    norms = [b.output_norm or b.core.head_norm for b in mixer.branches]
    merged: list[torch.Tensor] = []
    for module in norms:
        assert module is not None
        module.register_forward_hook(lambda _module, _args, out: merged.append(out))
    mixer(x.detach(), sequence)
    is_before = norm is BranchNorm.before_output
    goal = wanted.attend(x, sequence)[0] if is_before else wanted(x, sequence)
    loss = (sum(merged) / 2 - goal.detach()).square().sum()
    weights = [module.weight for module in norms if module is not None]
    gradients = torch.autograd.grad(loss, weights)
    # The ridge bends it by a millionth.
    assert all(float(g.abs().max()) < 1e-4 * float(loss) for g in gradients)
    note = fitted.values[next(iter(fitted.values))][1]
    assert f"on {ROWS * TOKENS} tokens" in note


def test_norms_of_branches_can_stay_at_one(tmp_path: Path) -> None:
    source, config = source_of(tmp_path / "hf")
    options = ConversionOptions(norm_init=NormInit.ones)
    assert fit_new_parameters(source, branched(config), options, rows()).values == {}


def test_alignment_of_branches_trains_their_norms(tmp_path: Path) -> None:
    source, config = source_of(tmp_path / "hf")
    target = branched(config, "L+S F F", merge=BranchMerge.learned)
    how = AlignmentOptions(learning_rate=1e-3, rows_per_step=2, epochs=2)
    fitted = fit_new_parameters(
        source, target, ConversionOptions(), rows(), alignment=(how, rows(2, num_rows=16))
    )
    (entry,) = fitted.alignment
    assert entry["layer"] == 0
    names = {"linear.head_norm.weight", "sliding_window.head_norm.weight"}
    names |= {"merge.weight"} if entry["kept"] else set()
    assert {name.partition(".mixer.")[2] for name in fitted.values} == names


def test_certificate_of_branches(tmp_path: Path) -> None:
    source, config = source_of(tmp_path / "hf")
    target = branched(config)
    found = compare_numerically(source, target, plan_conversion(source, target), rows())
    assert [layer["target"] for layer in found["layers"]] == ["L+S", "F", "F+S"]
    assert [entry["layer"] for entry in found["linear_layers"]] == [0]
    assert found["expert_layers"] == []


def test_key_bias_of_a_separate_linear_branch(tmp_path: Path) -> None:
    source, config = source_of(tmp_path / "hf")
    target = branched(config, projections=BranchProjections.separate)
    options = ConversionOptions(key_bias=KeyBias.zero)
    by_name = {tensor.name: tensor for tensor in plan_conversion(source, target, options)}
    assert not by_name["blocks.0.mixer.linear.k_proj.bias"].load().any()
    for other in ("0.mixer.sliding_window", "1.mixer", "2.mixer.full"):
        assert by_name[f"blocks.{other}.k_proj.bias"].load().any()
    options = ConversionOptions(key_bias=KeyBias.centre)
    fitted = fit_new_parameters(source, target, options, rows())
    name = "blocks.0.mixer.linear.k_proj.bias"
    assert [key for key in fitted.values if key.endswith("bias")] == [name]
    model = full_model(source, target, options=options, fitted=fitted.values)
    keys: list[torch.Tensor] = []
    mixer: Any = model.blocks[0].mixer
    mixer.linear.k_proj.register_forward_hook(lambda _module, _args, out: keys.append(out))
    model(rows().tokens, SequenceContext.one_document_per_row(ROWS, TOKENS))
    assert_close(keys[0].detach().mean(dim=(0, 1)), torch.zeros(16), absolute=1e-12)


def test_a_key_bias_that_two_branches_read_stays(tmp_path: Path) -> None:
    config = read_config({"model_type": "qwen2", **tiny_sources.SIZES})
    for key_bias in (KeyBias.zero, KeyBias.centre):
        with pytest.raises(ValueError, match=r"key_bias \(\w+\) must be keep where parallel bran"):
            check_key_bias(branched(config), ConversionOptions(key_bias=key_bias))
    check_key_bias(branched(config, "F+S F F"), ConversionOptions(key_bias=KeyBias.zero))


def test_branches_are_made_of_softmax_attention_only() -> None:
    config = read_config({"model_type": "qwen2", **tiny_sources.SIZES})
    source = branched(config)
    check_target(source, source)
    for mixers, words in (("F F F+S", r"layer 0 must stay L\+S .* got F"),
                          ("L+S F S", r"layer 2 must stay F\+S .* got S")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            check_target(source, dataclasses.replace(source, mixers=mixers))


def test_float32_source_keeps_float32_norms(tmp_path: Path) -> None:
    folder = tiny_sources.save("qwen2", tmp_path / "hf", dtype=torch.bfloat16)
    source = SafetensorsFolder(folder)
    target = branched(read_config(source.config))
    fitted = fit_new_parameters(source, target, ConversionOptions(), rows())
    plan = plan_conversion(source, target, fitted=fitted.values)
    assert {t.dtype for t in plan if t.name.endswith("head_norm.weight")} == {torch.float32}
    assert all(torch.isfinite(t.load()).all() for t in plan)
