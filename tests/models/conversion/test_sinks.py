"""Sink tokens in a conversion: how they start, what is fitted beside them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from models.config import ModelConfig
from models.conversion.attention_transfer import AlignmentOptions, fit_new_parameters
from models.conversion.certificate import compare_numerically
from models.conversion.convert import plan_conversion, unused_tensors
from models.conversion.expert_scales import measure_scales
from models.conversion.new_parameters import ConversionOptions, UpcycleMode, normal
from models.conversion.source_checks import check_target
from models.conversion.source_config import read_config
from models.conversion.target_tensor import OriginKind
from models.expert_config import ExpertConfig
from models.mixer_config import BranchConfig, BranchNorm, SinkConfig, SinkInit, SinkRope
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
from tests.models.conversion.test_branches import KEY_TIED

pytest.importorskip("transformers")


def with_sinks(config: ModelConfig, init: SinkInit = SinkInit.random, **sinks: Any) -> ModelConfig:
    """Everything that the 76B has, in three layers."""
    return dataclasses.replace(
        config, mixers="L+S F L+F", ffns="d e e", window_tokens=6, linear=KEY_TIED,
        branches=BranchConfig(), moe=ExpertConfig(num_experts=4), bos_token_id=7,
        sinks=SinkConfig(**{"num_tokens": 3, "init": init, **sinks}),
    )  # fmt: skip


def test_random_sinks_are_drawn(tmp_path: Path) -> None:
    source, config = source_of(tmp_path / "hf")
    by_name = {tensor.name: tensor for tensor in plan_conversion(source, with_sinks(config))}
    sinks = by_name["sinks.weight"]
    assert (sinks.origin.kind, sinks.shape) == (OriginKind.new, (3, 32))
    assert sinks.origin.note == "normal, standard deviation 0.02"
    assert torch.equal(sinks.load(), normal("sinks.weight", (3, 32), 1, 0.02).double())


def test_sinks_of_bos_are_near_its_embedding(tmp_path: Path) -> None:
    source, config = source_of(tmp_path / "hf")
    plan = plan_conversion(source, with_sinks(config, SinkInit.bos))
    assert {tensor.name for tensor in plan} == {
        name for name, _ in Model(with_sinks(config)).named_parameters()
    }
    assert unused_tensors(source, plan) == []
    sinks = {tensor.name: tensor for tensor in plan}["sinks.weight"]
    assert sinks.origin.sources == ("model.embed_tokens.weight",)
    assert sinks.origin.note == "embedding of token 7, noise of standard deviation 0.002"
    noise = sinks.load() - source.load("model.embed_tokens.weight")[7]
    assert 0.001 < float(noise.std()) < 0.003
    assert not torch.equal(sinks.load()[0], sinks.load()[1])


def test_sinks_need_an_embedding_and_stay_what_they_are() -> None:
    config = read_config({"model_type": "qwen2", **tiny_sources.SIZES})
    target = dataclasses.replace(with_sinks(config, SinkInit.bos), bos_token_id=61)
    with pytest.raises(ValueError, match=r"bos_token_id \(61\) must have an embedding .* got voc"):
        check_target(config, target)
    source = with_sinks(config)
    other = dataclasses.replace(source, sinks=SinkConfig(num_tokens=3, rope=SinkRope.none))
    with pytest.raises(ValueError, match=r"model.sinks.rope \(none\) must equal the source's"):
        check_target(source, other)


def test_norms_are_fitted_with_the_sinks_that_tokens_see(tmp_path: Path) -> None:
    """The certificate's first layer, which reads what the norms were fitted on, is closest so."""
    source, config = source_of(tmp_path / "hf")
    target = with_sinks(config)
    without = dataclasses.replace(target, sinks=SinkConfig())
    errors = []
    for fitted_for in (target, without):
        fitted = fit_new_parameters(source, fitted_for, ConversionOptions(), rows()).values
        teacher, model = full_model(source, config), full_model(source, target, fitted=fitted)
        sequence = SequenceContext.one_document_per_row(ROWS, TOKENS)
        with torch.no_grad():
            x, sinks = teacher.embedding(rows().tokens), model.sinks()  # type: ignore[misc]
            for layer in (0, 1):
                x, sinks = teacher.blocks[layer](x, sequence), model.blocks[layer].begin(sinks)[0]
            block, wanted = model.blocks[2], teacher.blocks[2]
            normed = wanted.mixer_norm(x)  # type: ignore[misc]
            goal = wanted.mixer.attend(normed, sequence)[0].flatten(2)  # type: ignore[union-attr]
            seen: list[torch.Tensor] = []
            mixer = block.mixer
            assert mixer is not None
            mixer.o_proj.register_forward_pre_hook(  # type: ignore[union-attr, operator]
                lambda _module, args, seen=seen: seen.append(args[0])
            )
            mixer(normed, sequence, sinks=block.mixer_norm(sinks))  # type: ignore[misc]
        errors.append(float((seen[-1] - goal).norm() / goal.norm()))
    assert errors[0] < errors[1]
    assert errors[0] < 0.7


def test_the_whole_model_is_converted_and_judged(tmp_path: Path) -> None:
    """Sinks count in no ratio: copies of the FFN put out what it does, for tokens."""
    source, config = source_of(tmp_path / "hf")
    options = ConversionOptions(upcycle=UpcycleMode.measured, router_std=0.6)
    target = with_sinks(config, SinkInit.bos)
    fitted = fit_new_parameters(source, target, options, rows()).values
    scales = measure_scales(source, target, options, rows(), fitted=fitted)
    plan = plan_conversion(source, target, options, fitted=fitted, scales=scales)
    found = compare_numerically(source, target, plan, rows())
    for entry in found["expert_layers"]:
        assert entry["output_ratio_mean"] == pytest.approx(1, abs=1e-9)
    model = full_model(source, target, options=options, fitted=fitted, scales=scales)
    with torch.no_grad():
        logits = model(rows().tokens, SequenceContext.one_document_per_row(ROWS, TOKENS))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows().labels.flatten())
    assert found["loss"]["target"] == pytest.approx(float(loss), rel=1e-9)


@pytest.mark.parametrize("init", list(SinkInit))
def test_the_spread_of_sinks_and_their_seed(init: SinkInit, tmp_path: Path) -> None:
    source, config = source_of(tmp_path / "hf")
    many = with_sinks(config, init, num_tokens=500)

    def values(seed: int) -> torch.Tensor:
        plan = plan_conversion(source, many, ConversionOptions(seed=seed))
        return next(tensor for tensor in plan if tensor.name == "sinks.weight").load()

    found, is_bos = values(1), init is SinkInit.bos
    noise = found - source.load("model.embed_tokens.weight")[7] if is_bos else found
    std = 0.002 if is_bos else 0.02
    assert float(noise.std()) == pytest.approx(std, rel=0.03)
    assert abs(float(noise.mean())) < 4 * std / math.sqrt(noise.numel())
    assert torch.equal(found, values(1))
    assert not torch.equal(found, values(2))


@pytest.mark.parametrize("norm", list(BranchNorm))
@pytest.mark.parametrize("through", [True, False])
def test_fitted_norms_are_better_than_their_neighbours(
    norm: BranchNorm, through: bool, tmp_path: Path
) -> None:
    """On the stream of the source, beside which the sinks walk through the target."""
    source, config = source_of(tmp_path / "hf")
    target = dataclasses.replace(
        with_sinks(config, through_linear=through), mixers="F L+F F", ffns="d*3",
        branches=BranchConfig(norm=norm),
    )  # fmt: skip
    fitted = fit_new_parameters(source, target, ConversionOptions(), rows()).values
    dense, model = full_model(source, config), full_model(source, target, fitted=fitted)
    is_before = norm is BranchNorm.before_output
    name = "head_norm" if is_before else "output_norm"
    weight = model.get_parameter(f"blocks.1.mixer.linear.{name}.weight")
    context = SequenceContext.one_document_per_row(ROWS, TOKENS)
    old, new = dense.blocks[1].mixer, model.blocks[1].mixer
    assert old is not None
    assert new is not None
    heads: list[torch.Tensor] = []
    for mixer in (old, new) if is_before else ():
        mixer.o_proj.register_forward_pre_hook(  # type: ignore[union-attr, operator]
            lambda _module, args: heads.append(args[0])
        )

    def error() -> float:
        """Head norms are fitted to heads, which the output projection mixes."""
        x = dense.blocks[0](dense.embedding(rows().tokens), context)  # type: ignore[misc]
        sinks = model.blocks[0].begin(model.sinks())[0]  # type: ignore[misc]
        normed, sinks = (dense.blocks[1].mixer_norm(each) for each in (x, sinks))  # type: ignore[misc]
        heads.clear()
        outputs = [old(normed, context), new(normed, context, sinks=sinks)[0]]
        seen = [each for each in heads if each.shape[:2] == (ROWS, TOKENS)] or outputs
        return float((seen[0] - seen[1]).square().sum())

    with torch.no_grad():
        best = error()
        for factor in (0.97, 1.03):
            weight.mul_(factor)
            assert error() > best
            weight.div_(factor)


def test_aligned_layers_see_sinks_too(tmp_path: Path) -> None:
    source, config = source_of(tmp_path / "hf")
    target = with_sinks(config)
    how = (AlignmentOptions(rows_per_step=1, epochs=2), rows(4))
    fitted = fit_new_parameters(source, target, ConversionOptions(), rows(), alignment=how)
    assert [entry["layer"] for entry in fitted.alignment] == [0, 2]
    without = dataclasses.replace(target, sinks=SinkConfig())
    other = fit_new_parameters(source, without, ConversionOptions(), rows(), alignment=how)
    pairs = list(zip(fitted.alignment, other.alignment, strict=True))
    assert all(entry["before"] != bare["before"] for entry, bare in pairs)


def test_sinks_of_a_plain_transformer_change_no_other_tensor(tmp_path: Path) -> None:
    source, config = source_of(tmp_path / "hf")
    plan = plan_conversion(
        source, dataclasses.replace(with_sinks(config), mixers="F*3", ffns="d*3")
    )
    new = [tensor.name for tensor in plan if tensor.origin.kind is not OriginKind.copied]
    assert new == ["sinks.weight"]
