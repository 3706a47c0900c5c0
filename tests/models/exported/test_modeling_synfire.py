from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from models.config import NeuronKind, SpikingConfig
from models.conversion.source_config import read_config
from models.generation import generate
from models.loss import MASKED
from models.model import Model
from models.sequence import SequenceContext
from models.spiking.neurons import Spikes
from tests.models.exported.folders import CASES, LEARNED, case, logits_of, open_folder, save
from tests.models.tiny import random_tokens, tiny_model
from tests.support.closeness import relative_error

pytest.importorskip("transformers")
PADDED = ("all mixers", "shared branches", "sigmoid experts", "absolute sinks")


def both(name: str, folder: Path, **changes: Any) -> tuple[Model, Any]:
    """A float64 model of a case and its exported twin."""
    model = tiny_model(case(name, **changes))
    return model, open_folder(save(model, folder))


def with_ties(model: Model) -> Model:
    """Routers at zero leave every choice to the order of ties."""
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "router" in parameter_name:
                parameter.zero_()
    return model


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_logits_equal(name: str, dtype: torch.dtype, limit: float, tmp_path: Path) -> None:
    model = tiny_model(case(name), dtype=dtype)
    twin = open_folder(save(model, tmp_path / "out"))
    tokens = random_tokens(3, 70)
    with torch.no_grad():
        logits = twin(tokens).logits
    assert logits.dtype is dtype
    assert relative_error(logits, logits_of(model, tokens)) < limit
    read = read_config(json.loads((tmp_path / "out" / "config.json").read_text()))
    assert read.layers == model.config.layers
    patterns = {"mixers": model.config.mixers, "ffns": model.config.ffns}
    assert dataclasses.replace(read, **patterns) == model.config


@pytest.mark.parametrize("name", list(CASES))
def test_generation_is_synfires_greedy_generation(name: str, tmp_path: Path) -> None:
    model, twin = both(name, tmp_path / "out")
    prompt = random_tokens(2, 9)
    expected = generate(model, prompt, max_new_tokens=12)
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    for more in ({}, {"use_cache": False}, {"prefill_chunk_size": 4}):
        assert torch.equal(twin.generate(prompt, **options, **more), expected), more


@pytest.mark.parametrize("name", ["sigmoid experts", "absolute sinks"])
def test_equal_scores_come_in_the_same_order(name: str, tmp_path: Path) -> None:
    model = with_ties(tiny_model(case(name)))
    twin = open_folder(save(model, tmp_path / "out"))
    tokens = random_tokens(2, 40)
    with torch.no_grad():
        assert relative_error(twin(tokens).logits, logits_of(model, tokens)) < 1e-10


@pytest.mark.parametrize("name", PADDED)
def test_padding_changes_nothing_wherever_it_lies(name: str, tmp_path: Path) -> None:
    model = with_ties(tiny_model(case(name)))
    twin = open_folder(save(model, tmp_path / "out"))
    mask = torch.tensor(
        [[0] * 9 + [1] * 15, [1] * 24, [1] * 11 + [0] * 13, [0, 1, 1, 0] * 6, [0] * 24]
    )
    tokens = random_tokens(len(mask), 24).where(mask.bool(), 60)
    with torch.no_grad():
        whole = twin(tokens, attention_mask=mask).logits
        pieces, cache = [], None
        for start, stop in ((0, 7), (7, 8), (8, 20), (20, 24)):
            out = twin(
                tokens[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache,
                use_cache=True,
            )  # fmt: skip
            cache = out.past_key_values
            pieces.append(out.logits)
    assert torch.isfinite(whole).all()
    for row, is_real in enumerate(mask.bool()):
        if not is_real.any():
            continue
        expected = logits_of(model, tokens[row : row + 1, is_real])[0]
        for logits in (whole, torch.cat(pieces, dim=1)):
            assert relative_error(logits[row, is_real], expected) < 1e-10


@pytest.mark.parametrize("name", PADDED)
def test_rows_of_other_lengths_generate_as_if_alone(name: str, tmp_path: Path) -> None:
    model, twin = both(name, tmp_path / "out")
    prompts = [random_tokens(1, length, seed=length) for length in (3, 11, 7)]
    padded = [torch.nn.functional.pad(each, (11 - each.shape[1], 0)) for each in prompts]
    mask = torch.stack([torch.arange(11) >= 11 - each.shape[1] for each in prompts]).long()
    out = twin.generate(
        torch.cat(padded), attention_mask=mask, max_new_tokens=10, do_sample=False
    )  # fmt: skip
    for row, prompt in enumerate(prompts):
        expected = generate(model, prompt, max_new_tokens=10)[0, prompt.shape[1] :]
        assert torch.equal(out[row, 11:], expected)


def test_beams_take_their_states_along(tmp_path: Path) -> None:
    _, twin = both("all mixers", tmp_path / "out")
    prompt = random_tokens(2, 6)
    options = {"max_new_tokens": 8, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    runs = [
        twin.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=cached, **options)
        for cached in (True, False)
    ]
    assert torch.equal(*runs)
    assert len(runs[0]) == 4


def test_linear_and_window_layers_remember_no_more_with_more_tokens(tmp_path: Path) -> None:
    _, twin = both("all mixers", tmp_path / "out", mixers="L S+L S _")
    sizes, cache = [], None
    for tokens in (random_tokens(2, 40), *random_tokens(2, 3).T[..., None]):
        with torch.no_grad():
            cache = twin(tokens, past_key_values=cache, use_cache=True).past_key_values
        stored = [value.untyped_storage() for state in cache.states for value in state.values()]
        sizes.append(sum(storage.nbytes() for storage in stored))
    assert sizes[0] > 0
    assert set(sizes) == {sizes[0]}
    assert cache.get_seq_length() == 43
    cache.reset()
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        again = twin(random_tokens(2, 40), past_key_values=cache, use_cache=True).logits
        assert torch.equal(again, twin(random_tokens(2, 40)).logits)


def test_a_cache_of_other_rows(tmp_path: Path) -> None:
    _, twin = both("all mixers", tmp_path / "out")
    tokens, after = random_tokens(2, 12), random_tokens(4, 1)
    with torch.no_grad():
        cache = twin(tokens, use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        logits = twin(after, past_key_values=cache).logits
        rows = torch.cat([tokens.repeat_interleave(2, 0), after], dim=1)
        assert relative_error(logits[:, 0], twin(rows).logits[:, -1]) < 1e-10


@pytest.mark.parametrize(
    ("spikes", "max_count"), [(Spikes(k=2.0), None), (Spikes(k=1.5, blend=0.25), 3)]
)
def test_a_spiking_model_spikes_unless_told_not_to(
    spikes: Spikes, max_count: int | None, tmp_path: Path
) -> None:
    spiking = SpikingConfig(neuron=NeuronKind.adaptive, k=9.0, max_count=max_count)
    changes = {"ffns": "d e d e", "moe": CASES["sigmoid experts"]["moe"]}
    model = tiny_model(case("separate branches", **changes), spiking=spiking)
    folder = save(model, tmp_path / "out", spiking=spiking, spikes=spikes)
    tokens = random_tokens(2, 30)
    expected = logits_of(model, tokens, spikes=spikes)
    continuous = logits_of(model, tokens)
    assert relative_error(expected, continuous) > 1e-3
    with torch.no_grad():
        assert relative_error(open_folder(folder)(tokens).logits, expected) < 1e-10
        silent = open_folder(folder, spiking=None)(tokens).logits
    assert relative_error(silent, continuous) < 1e-10


@pytest.mark.parametrize(
    "name", ["all mixers", "softmax experts", "absolute sinks", "sinks without rope"]
)
def test_loss_and_gradients_equal(name: str, tmp_path: Path) -> None:
    model, twin = both(name, tmp_path / "out")
    tokens = random_tokens(2, 24)
    targets = tokens.clone()
    targets[0, :5] = MASKED
    out = twin.train()(tokens, labels=targets)
    assert out.past_key_values is None
    out.loss.backward()
    labels = torch.nn.functional.pad(targets[:, 1:], (0, 1), value=MASKED)
    loss = model(tokens, SequenceContext.one_document_per_row(2, 24), labels=labels)
    (loss / (labels != MASKED).sum()).backward()
    assert relative_error(out.loss, loss / (labels != MASKED).sum()) < 1e-12
    theirs = dict(twin.named_parameters())
    for parameter_name, parameter in model.named_parameters():
        there = "lm_head.weight" if parameter_name == "head.weight" else f"model.{parameter_name}"
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert relative_error(theirs[there].grad, parameter.grad) < 1e-9, parameter_name


def test_bfloat16_keeps_norms_gates_and_routers_in_float32(tmp_path: Path) -> None:
    model = tiny_model(
        case("sigmoid experts", mixers="L+S F L S", branches=LEARNED), dtype=torch.float32
    )
    twin = open_folder(save(model, tmp_path / "out"), dtype=torch.bfloat16)
    kept = {name for name, value in twin.named_parameters() if value.dtype is torch.float32}
    words = ("norm.weight", "router.weight", "selection_bias", "gate_down.", "gate_up.", "merge.")
    assert kept == {
        name for name, _ in twin.named_parameters() if any(word in name for word in words)
    }
    tokens = random_tokens(2, 30)
    with torch.no_grad():
        logits = twin(tokens).logits
    expected = logits_of(model, tokens)
    assert logits.dtype is torch.float32
    assert torch.nn.functional.cosine_similarity(logits, expected, dim=-1).mean() > 0.98


def test_what_else_a_call_returns(tmp_path: Path) -> None:
    model, twin = both("all mixers", tmp_path / "out")
    tokens = random_tokens(2, 12)
    with torch.no_grad():
        out = twin(tokens, output_hidden_states=True)
        x = model.embedding(tokens)
        assert torch.equal(out.hidden_states[0], x)
        assert len(out.hidden_states) == model.config.num_hidden_layers + 1
        assert torch.equal(twin.lm_head(out.hidden_states[-1]), out.logits)
        assert torch.equal(twin(inputs_embeds=x).logits, out.logits)
        some = twin(tokens, logits_to_keep=3).logits
        assert relative_error(some, out.logits[:, -3:]) < 1e-12
        some = twin(tokens, logits_to_keep=torch.tensor([1, 4])).logits
        assert relative_error(some, out.logits[:, [1, 4]]) < 1e-12
        assert torch.equal(twin(tokens, return_dict=False)[0], out.logits)
        assert twin(tokens, use_cache=False).past_key_values is None


def test_refusals(tmp_path: Path) -> None:
    from transformers import DynamicCache

    _, twin = both("all mixers", tmp_path / "out")
    tokens = random_tokens(2, 5)
    cache = twin(tokens, use_cache=True).past_key_values
    for call, message in (
        (lambda: twin(), "input_ids or inputs_embeds must be given: got both or neither"),
        (lambda: twin(tokens, inputs_embeds=tokens), "got both or neither"),
        (lambda: twin(tokens, past_key_values=DynamicCache()), r"\(DynamicCache\) must be a Syn"),
        (lambda: twin(tokens, attention_mask=torch.ones(2, 4)), r"mask \(2, 4\) must cover .*2, 5"),
        (lambda: twin(tokens[:1], past_key_values=cache), r"\(2 rows\) must have as many .* got 1"),
        (lambda: cache.crop(-2), r"crop \(-2\) must not be asked"),
        (lambda: twin.generate(tokens, cache_implementation="static"), r"\(static\) must be left"),
        (lambda: type(twin.config)(layer_mixers=["L"]), r"layer_ffns \(0 layers\) must .* got 1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()


def test_models_start_from_a_config_alone(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = save(tiny_model(case("softmax experts")), tmp_path / "out")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert type(config)().to_diff_dict()["model_type"] == "synfire"
    new = AutoModelForCausalLM.from_config(config, trust_remote_code=True).eval()
    with torch.no_grad():
        logits = new(random_tokens(2, 12)).logits
    assert torch.isfinite(logits).all()
    assert 0 < float(new.model.blocks[0].ffn.experts.up_proj.weight.detach().std()) < 0.3
