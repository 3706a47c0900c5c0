"""The exported modelling files compute what Synfire computes: logits, gradients, decoding."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from models.config import SpikingConfig
from models.generation import generate
from models.mixer_config import LinearAttentionConfig, RopeConfig, RopeType
from models.model import Model
from models.sequence import SequenceContext
from models.spiking.neurons import Spikes
from tests.models.exported.exporting import adaptive, exported
from tests.models.tiny import random_tokens, tiny_config, tiny_model
from tests.support.closeness import assert_close

pytest.importorskip("transformers")

ROWS, TOKENS = 3, 70
"""Longer than two chunks of the linear mixer, much longer than a window."""


@dataclass(frozen=True)
class Case:
    """Changes of the tiny model, and how it spikes."""

    changes: dict[str, Any] = field(default_factory=dict)
    spiking: SpikingConfig | None = None
    spikes: Spikes | None = None


YARN = RopeConfig(theta=500.0, type=RopeType.yarn, factor=4.0, original_max_position_embeddings=32)
CASES = {
    "all mixers": Case(),
    "full and linear": Case({"mixers": "[L F]*2", "qk_norm": True, "qkv_bias": False}),
    "windows that look back": Case({"mixers": "S L S L", "window_includes_self": False}),
    "one visible key": Case({"mixers": "S L", "ffns": "d d", "window_tokens": 1}),
    "biases and a tied head": Case(
        {"output_bias": True, "ffn_bias": True, "tie_word_embeddings": True}
    ),
    "linear gates": Case(
        {
            "mixers": "L*2",
            "ffns": "d d",
            "linear": LinearAttentionConfig(
                gate_low_rank_dim=3, gate_logit_normalizer=2.0, norm_eps=1e-3
            ),
        }
    ),
    "linear rope": Case({"rope": RopeConfig(theta=1e3, type=RopeType.linear, factor=2.0)}),
    "llama3 rope": Case(
        {
            "rope": RopeConfig(
                theta=500.0, type=RopeType.llama3, factor=8.0, original_max_position_embeddings=64
            )
        }
    ),
    "yarn": Case({"rope": YARN}),
    "yarn by other numbers": Case(
        {
            "rope": RopeConfig(
                theta=500.0, type=RopeType.yarn, factor=4.0, beta_fast=8.0, truncate=False,
                mscale=0.7, mscale_all_dim=1.2,
            ),
            "max_position_embeddings": 64,
        }
    ),
    "spikes": Case(spiking=adaptive(), spikes=Spikes(k=2.5)),
    "clipped and blended spikes": Case(
        spiking=adaptive(max_count=2), spikes=Spikes(k=3.0, blend=0.25)
    ),
}  # fmt: skip


def build(case: Case, dtype: torch.dtype = torch.float64) -> Model:
    return tiny_model(tiny_config(**case.changes), dtype=dtype, spiking=case.spiking).eval()


def logits_of(model: Model, tokens: torch.Tensor, spikes: Spikes | None) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, SequenceContext.one_document_per_row(*tokens.shape), spikes=spikes)


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_decoding_are_synfires(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = build(case)
    theirs = exported(model, tmp_path / "out", case.spikes)
    tokens = random_tokens(ROWS, TOKENS)
    expected = logits_of(model, tokens, case.spikes)
    with torch.no_grad():
        assert_close(theirs(tokens, use_cache=False).logits, expected, relative=1e-10)
    prompt, mask = tokens[:, :40], torch.ones(ROWS, 40)
    ours = generate(model, prompt, max_new_tokens=12, spikes=case.spikes)
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask}
    assert torch.equal(theirs.generate(prompt, **options), ours)
    chunked = theirs.generate(prompt, **options, prefill_chunk_size=17)
    assert torch.equal(chunked, ours)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.spikes is None])
def test_float32_logits_are_synfires(name: str, tmp_path: Path) -> None:
    model = build(CASES[name], torch.float32)
    theirs = exported(model, tmp_path / "out")
    tokens = random_tokens(ROWS, TOKENS)
    with torch.no_grad():
        logits = theirs(tokens).logits
    assert logits.dtype is torch.float32
    assert_close(logits, logits_of(model, tokens, None), relative=1e-5)


def test_bfloat16_keeps_norms_and_gates_in_float32(tmp_path: Path) -> None:
    model = build(CASES["all mixers"], torch.float32)
    theirs = exported(model, tmp_path / "out", dtype=torch.bfloat16)
    wide = {name for name, p in theirs.named_parameters() if p.dtype is torch.float32}
    assert wide == {n for n, _ in theirs.named_parameters() if "norm" in n or "gate_" in n} - {
        f"model.blocks.{layer}.ffn.gate_proj.weight" for layer in range(4)
    }
    ours = build(CASES["all mixers"], torch.float32)
    for name, parameter in ours.named_parameters():
        if f"model.{name}" not in wide:
            parameter.data = parameter.data.bfloat16()
    tokens = random_tokens(ROWS, TOKENS)
    with torch.no_grad():
        logits = theirs(tokens).logits
    assert logits.dtype is torch.float32
    # Both round at the same places, but not the same sums.
    assert_close(logits, logits_of(ours, tokens, None), relative=3e-2)


def test_queries_come_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask exists for a few queries at a time, with and without earlier tokens."""
    from models.exported import kernels_synfire

    model = build(CASES["all mixers"])
    theirs = exported(model, tmp_path / "out")
    tokens = random_tokens(ROWS, TOKENS)
    monkeypatch.setattr(kernels_synfire, "QUERY_BLOCK", 16)
    seen = []
    attend_all = kernels_synfire.attend_all

    def spy(*args: Any, **options: Any) -> torch.Tensor:
        seen.append(tuple(options["visible"].shape[2:]))
        return attend_all(*args, **options)

    monkeypatch.setattr(kernels_synfire, "attend_all", spy)
    with torch.no_grad():
        first = theirs(tokens[:, :37])
        second = theirs(tokens[:, 37:], past_key_values=first.past_key_values)
    logits = torch.cat([first.logits, second.logits], dim=1)
    assert_close(logits, logits_of(model, tokens, None), relative=1e-10)
    # Window 5: 16 queries see 4 keys more. The full mixer's blocks end at their last query.
    assert seen[:3] == [(16, 16), (16, 20), (5, 9)]
    assert seen[3:6] == [(16, 16), (16, 32), (5, 37)]
    assert seen[-3:] == [(16, 53), (16, 69), (1, 70)]


@pytest.mark.parametrize("name", ["all mixers", "spikes"])
def test_loss_and_gradients_are_synfires(name: str, tmp_path: Path) -> None:
    """An exported model can be trained on: its loss is the mean over next tokens."""
    case = CASES[name]
    model = build(case)
    theirs = exported(model, tmp_path / "out", case.spikes).train()
    tokens = random_tokens(ROWS, TOKENS)
    labels = tokens.masked_fill(random_tokens(ROWS, TOKENS, seed=1) < 9, -100)
    next_tokens = torch.cat([labels[:, 1:], torch.full((ROWS, 1), -100)], dim=1)
    context = SequenceContext.one_document_per_row(ROWS, TOKENS)
    total = model(tokens, context, labels=next_tokens, spikes=case.spikes)
    (total / (next_tokens != -100).sum()).backward()
    out = theirs(tokens, labels=labels)
    assert out.past_key_values is None
    out.loss.backward()
    assert_close(out.loss, (total / (next_tokens != -100).sum()).detach(), relative=1e-12)
    names = {"head.weight": "lm_head.weight"}
    gradients = {key: p.grad for key, p in theirs.named_parameters()}
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None
        found = gradients[names.get(key, f"model.{key}")]
        assert_close(found, parameter.grad, relative=1e-9, name=key)


def test_spiking_is_a_switch_of_the_config(tmp_path: Path) -> None:
    case = CASES["spikes"]
    model = build(case)
    tokens = random_tokens(1, 9)
    theirs = exported(model, tmp_path / "out", case.spikes)
    silent = type(theirs).from_pretrained(tmp_path / "out", spiking=None, dtype=torch.float64)
    with torch.no_grad():
        assert_close(silent(tokens).logits, logits_of(model, tokens, None), relative=1e-10)
        assert not torch.allclose(silent(tokens).logits, theirs(tokens).logits)


def test_hidden_states_and_tuples(tmp_path: Path) -> None:
    model = build(CASES["all mixers"])
    theirs = exported(model, tmp_path / "out")
    tokens = random_tokens(2, 9)
    with torch.no_grad():
        out = theirs(tokens, output_hidden_states=True)
        expected = model.hidden_states(tokens, SequenceContext.one_document_per_row(2, 9))
        logits, cache = theirs(tokens, return_dict=False, logits_to_keep=2)
        third = theirs(tokens, logits_to_keep=torch.tensor([3]))
        embedded = theirs(inputs_embeds=theirs.get_input_embeddings()(tokens))
    assert len(out.hidden_states) == 5
    assert_close(out.hidden_states[-1], expected, relative=1e-10)
    assert_close(logits, out.logits[:, -2:], relative=1e-12)
    assert_close(third.logits, out.logits[:, 3:4], relative=1e-12)
    assert torch.equal(embedded.logits, out.logits)
    assert cache.get_seq_length() == 9


def test_a_model_without_weights_starts_finite() -> None:
    from models.conversion.own_format import own_keys
    from models.exported.configuration_synfire import SynfireConfig
    from models.exported.modeling_synfire import SynfireForCausalLM

    config = SynfireConfig(**own_keys(tiny_config(), None, None))
    assert (config.num_hidden_layers, config.model_type) == (4, "synfire")
    model = SynfireForCausalLM(config)
    assert model(random_tokens(1, 5)).logits.isfinite().all()
