"""A dense FFN as experts: origins, factors, the same output as before, refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from models.config import ModelConfig
from models.conversion.certificate import build_certificate, compare_numerically
from models.conversion.convert import plan_conversion, unused_tensors
from models.conversion.expert_scales import measure_scales
from models.conversion.huggingface import SafetensorsFolder
from models.conversion.new_parameters import ConversionOptions, UpcycleMode, normal
from models.conversion.source_checks import check_target, upcycled
from models.conversion.source_config import read_config
from models.conversion.target_tensor import OriginKind
from models.conversion.upcycling import exact_factor, paper_factor
from models.expert_config import Balance, ExpertConfig, RouterScore
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

pytest.importorskip("transformers")

MEASURED = ConversionOptions(upcycle=UpcycleMode.measured, router_std=0.6)
PAPER = ConversionOptions(upcycle=UpcycleMode.paper, router_std=0.6)


def experts(config: ModelConfig, ffns: str = "e d e", **moe: Any) -> ModelConfig:
    """`config` with some layers made of four experts and a shared one."""
    return dataclasses.replace(config, ffns=ffns, moe=ExpertConfig(**{"num_experts": 4, **moe}))


def outputs(model: Model) -> tuple[torch.Tensor, float]:
    """Logits and loss on the sample."""
    sample = rows()
    sequence = SequenceContext.one_document_per_row(ROWS, TOKENS)
    with torch.no_grad():
        logits = model(sample.tokens, sequence)
    return logits, float(F.cross_entropy(logits.flatten(0, 1), sample.labels.flatten()))


EXACT = {
    "one of four and a shared one": {},
    "top 2": {"top_k": 2},
    "sigmoid": {"score": RouterScore.sigmoid},
    "renormalised": {"top_k": 2, "renormalise": True},
    "sigmoid, renormalised": {"score": RouterScore.sigmoid, "top_k": 3, "renormalise": True},
    "two shared": {"num_shared_experts": 2},
    "none shared": {"num_shared_experts": 0, "top_k": 2},
    "remembered load": {"balance": Balance.previous_step},
    "selection bias": {"balance": Balance.bias},
    "one expert": {"num_experts": 1},
}


@pytest.mark.parametrize("moe", EXACT.values(), ids=EXACT.keys())
@pytest.mark.parametrize("ffns", ["e*3", "e d e"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_is_the_dense_model(
    moe: dict[str, Any], ffns: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    source = SafetensorsFolder(tiny_sources.save("qwen2", tmp_path / "hf", dtype=dtype))
    config = read_config(source.config)
    target = experts(config, ffns, **moe)
    plan = plan_conversion(source, target)
    models = []
    for each, planned in ((config, plan_conversion(source, config)), (target, plan)):
        model = Model(each)
        model.load_state_dict({t.name: t.load().clone() for t in planned}, assign=True)
        models.append(outputs(model))
    (dense, dense_loss), (moe_logits, moe_loss) = models
    error = float((moe_logits - dense).norm() / dense.norm())
    assert error < (1e-12 if dtype is torch.float64 else 1e-5)
    assert abs(moe_loss - dense_loss) < (1e-12 if dtype is torch.float64 else 1e-4)


def test_every_tensor_of_experts_is_explained(tmp_path: Path) -> None:
    source, config = source_of(tmp_path / "hf")
    target = experts(config, "d e d", num_shared_experts=2, balance=Balance.bias)
    plan = plan_conversion(source, target)
    assert unused_tensors(source, plan) == []
    by_name = {tensor.name: tensor for tensor in plan}
    assert by_name.keys() == {name for name, _ in Model(target).named_parameters()}
    certificate = build_certificate(source, target, ConversionOptions(), plan)
    assert certificate["unexplained_tensors"] == []
    mlp, ffn = "model.layers.1.mlp.", "blocks.1.ffn."
    factor = 1 / (2 + 1 / 4)
    for name, kind, note in (
        ("experts.gate_proj", OriginKind.reshaped, "4 copies"),
        ("experts.up_proj", OriginKind.reshaped, "4 copies"),
        ("shared.up_proj", OriginKind.reshaped, "2 copies"),
        ("experts.down_proj", OriginKind.scaled, "4 copies, by 0.444444 (exact: 1 / (S + k p0))"),
        ("shared.down_proj", OriginKind.scaled, "2 copies, by 0.444444 (exact: 1 / (S + k p0))"),
    ):
        tensor = by_name[f"{ffn}{name}.weight"]
        known = f"{mlp}{name.partition('.')[2]}.weight"
        assert (tensor.origin.kind, tensor.origin.note) == (kind, note)
        assert tensor.origin.sources == (known,)
        stored = source.load(known) * (factor if kind is OriginKind.scaled else 1)
        parts = tensor.load()
        assert parts.shape == tensor.shape
        dim = 1 if name == "shared.down_proj" else 0
        for part in parts if name.startswith("experts") else parts.chunk(2, dim=dim):
            assert torch.equal(part, stored)
    for name in ("router.weight", "router.selection_bias"):
        tensor = by_name[ffn + name]
        assert (tensor.origin.kind, tensor.origin.note) == (OriginKind.new, "zeros")
        assert not tensor.load().any()
        assert tensor.load().shape == tensor.shape
    # One memory for all copies.
    assert by_name[f"{ffn}experts.up_proj.weight"].load().stride(0) == 0


def test_one_shared_expert_is_copied_as_it_is(tmp_path: Path) -> None:
    source, config = source_of(tmp_path / "hf")
    plan = plan_conversion(source, experts(config, balance=Balance.previous_step))
    by_name = {tensor.name: tensor for tensor in plan}
    assert by_name["blocks.0.ffn.shared.up_proj.weight"].origin.kind is OriginKind.copied
    load = by_name["blocks.0.ffn.router.previous_load"]
    assert (load.origin.note, load.load().tolist()) == ("even", [0.25] * 4)


@pytest.mark.parametrize(
    ("moe", "factor"),
    [
        ({"num_experts": 16}, 1 / (1 + 1 / 16)),
        ({"num_experts": 16, "top_k": 4, "num_shared_experts": 0}, 4.0),
        ({"score": RouterScore.sigmoid, "top_k": 2}, 1 / (1 + 2 / 2)),
        ({"renormalise": True, "top_k": 2}, 1 / 2),
        ({"renormalise": True, "top_k": 2, "num_shared_experts": 3}, 1 / 4),
    ],
)
def test_exact_factor(moe: dict[str, Any], factor: float) -> None:
    assert exact_factor(ExpertConfig(**moe)) == pytest.approx(factor, rel=1e-15)


def test_paper_factor_is_the_reports() -> None:
    assert paper_factor(ExpertConfig()) == pytest.approx(0.97999, abs=5e-6)


def test_paper_scales_all_three_matrices(tmp_path: Path) -> None:
    source, config = source_of(tmp_path / "hf")
    target = experts(config, "d e d")
    by_name = {tensor.name: tensor for tensor in plan_conversion(source, target, PAPER)}
    alpha = (1 / (1 + 1 / 4)) ** (1 / 3)
    for name in ("gate_proj", "up_proj", "down_proj"):
        stored = source.load(f"model.layers.1.mlp.{name}.weight")
        for home in ("experts", "shared"):
            tensor = by_name[f"blocks.1.ffn.{home}.{name}.weight"]
            assert tensor.origin.kind is OriginKind.scaled
            assert "(paper: the cube root" in tensor.origin.note
            assert torch.allclose(tensor.load(), stored * alpha, rtol=1e-14)


def test_random_routers_depend_on_seed_and_name_alone(tmp_path: Path) -> None:
    source, config = source_of(tmp_path / "hf")
    target = experts(config, "e d e")
    by_name = {tensor.name: tensor for tensor in plan_conversion(source, target, PAPER)}
    router = by_name["blocks.0.ffn.router.weight"]
    assert router.origin.note == "normal, standard deviation 0.6"
    expected = normal("blocks.0.ffn.router.weight", (4, 32), 1, 0.6)
    assert torch.equal(router.load(), expected.double())
    assert not torch.equal(router.load(), by_name["blocks.2.ffn.router.weight"].load())
    assert not torch.equal(expected, normal("blocks.0.ffn.router.weight", (4, 32), 2, 0.6))
    assert float(normal("x", (400, 500), 1, 0.6).std()) == pytest.approx(0.6, rel=0.01)
    options = dataclasses.replace(PAPER, router_std=None)
    assert options.router_std_of(target) == target.initializer_range


@pytest.mark.parametrize(
    "moe", [{}, {"top_k": 2}, {"score": RouterScore.sigmoid}, {"num_shared_experts": 2}]
)
def test_measured_keeps_the_mean_of_the_output(moe: dict[str, Any], tmp_path: Path) -> None:
    """On the text that was measured, with linear layers before and between."""
    source, config = source_of(tmp_path / "hf")
    target = dataclasses.replace(experts(config, "d e e", **moe), mixers="L F L")
    scales = measure_scales(source, target, MEASURED, rows())
    assert scales.keys() == {1, 2}
    plan = plan_conversion(source, target, MEASURED, scales=scales)
    found = compare_numerically(source, target, plan, rows())["expert_layers"]
    assert [entry["layer"] for entry in found] == [1, 2]
    for entry in found:
        assert entry["output_ratio_mean"] == pytest.approx(1, abs=1e-9)
        assert entry["output_ratio_min"] < 0.99
        assert entry["output_ratio_max"] > 1.01
    note = {t.name: t.origin.note for t in plan}["blocks.1.ffn.shared.down_proj.weight"]
    assert "measured: 1 / mean of S + chosen weights" in note


def test_measured_holds_on_other_text(tmp_path: Path) -> None:
    source, config = source_of(tmp_path / "hf")
    target = experts(config, "e*3", num_experts=8)
    options = dataclasses.replace(MEASURED, router_std=0.1)
    scales = measure_scales(source, target, options, rows(5, num_rows=80))
    plan = plan_conversion(source, target, options, scales=scales)
    for entry in compare_numerically(source, target, plan, rows(6, num_rows=80))["expert_layers"]:
        assert entry["output_ratio_mean"] == pytest.approx(1, abs=0.005)
        assert entry["output_ratio_max"] > 1.02


def test_ratios_of_the_certificate_are_those_of_whole_models(tmp_path: Path) -> None:
    source, config = source_of(tmp_path / "hf")
    target = experts(config, "d e e")
    plan = plan_conversion(source, target, PAPER)
    found = compare_numerically(source, target, plan, rows())["expert_layers"]
    dense, moe = full_model(source, config), full_model(source, target, options=PAPER)
    seen: list[torch.Tensor] = []
    for before, after in zip(dense.blocks, moe.blocks, strict=True):
        after.ffn.register_forward_hook(
            lambda _module, args, out, ffn=before.ffn: seen.append(
                (out.norm(dim=-1) / ffn(args[0]).norm(dim=-1)).detach()
            )
        )
    outputs(moe)
    for entry, ratio in zip(found, seen[1:], strict=True):
        assert entry["output_ratio_mean"] == pytest.approx(float(ratio.mean()), rel=1e-9)
        assert entry["output_ratio_min"] == pytest.approx(float(ratio.min()), rel=1e-9)
        assert entry["output_ratio_max"] == pytest.approx(float(ratio.max()), rel=1e-9)
    assert [entry["layer"] for entry in found] == [1, 2]


def test_a_model_with_experts_is_no_source_of_other_ones() -> None:
    config = read_config({"model_type": "qwen2", **tiny_sources.SIZES})
    source = experts(config, "d e d")
    check_target(source, source)
    assert upcycled(source, source) == []
    assert upcycled(config, source) == [1]
    with pytest.raises(ValueError, match=r"ffns \(.*\) layer 1 must stay e as in the source"):
        check_target(source, dataclasses.replace(source, ffns="d*3"))
    with pytest.raises(ValueError, match=r"model.moe.num_experts \(8\) must equal the source's"):
        check_target(source, dataclasses.replace(source, moe=ExpertConfig(num_experts=8)))


def test_a_source_without_that_ffn_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny_sources.save("qwen2", tmp_path / "hf")
    values = load_file(folder / "model.safetensors")
    del values["model.layers.1.mlp.up_proj.weight"]
    save_file(values, folder / "model.safetensors")
    source = SafetensorsFolder(folder)
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.weight is missing"):
        plan_conversion(source, experts(read_config(source.config), "d e d"))
