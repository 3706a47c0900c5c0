"""Padding leaves no trace, and the cache of an exported model is as large as it must be."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models.exported.exporting import exported, rows_alone
from tests.models.tiny import random_tokens, tiny_config, tiny_model
from tests.support.closeness import assert_close

pytest.importorskip("transformers")

LENGTHS = (40, 7, 23)
SIDES = {"left": lambda free: free, "right": lambda free: 0, "both": lambda free: free // 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """All four mixers."""
    folder = tmp_path_factory.mktemp("exported") / "out"
    return exported(tiny_model(tiny_config(bos_token_id=1)), folder).eval()


@pytest.fixture(scope="module")
def rows() -> list[torch.Tensor]:
    return [random_tokens(1, length, seed=length)[0] for length in LENGTHS]


def padded(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and their mask; padding has tokens of its own."""
    longest = max(map(len, rows))
    tokens = random_tokens(len(rows), longest, seed=99)
    mask = torch.zeros_like(tokens)
    for index, row in enumerate(rows):
        start = SIDES[side](longest - len(row))
        tokens[index, start : start + len(row)] = row
        mask[index, start : start + len(row)] = 1
    return tokens, mask


@pytest.mark.parametrize("side", SIDES)
def test_padded_rows_compute_as_if_alone(model: Any, rows: list[Any], side: str) -> None:
    tokens, mask = padded(rows, side)
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask).logits
    for index, expected in enumerate(rows_alone(model, rows)):
        assert_close(logits[index][mask[index] == 1], expected, relative=1e-10)


def test_padding_on_the_right_needs_no_mask(model: Any, rows: list[Any]) -> None:
    """As evaluation harnesses score continuations: pad right, pass no mask, cut the logits."""
    tokens, _ = padded(rows, "right")
    with torch.no_grad():
        scores = model(tokens).logits.log_softmax(dim=-1)
    for index, expected in enumerate(rows_alone(model, rows)):
        assert_close(scores[index][: LENGTHS[index]], expected.log_softmax(dim=-1), relative=1e-10)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("pieces", [(13, 9, 18), (22, 1, 1, 16), (40,)])
def test_a_cache_goes_on_after_padding(
    model: Any, rows: list[Any], side: str, pieces: tuple[int, ...]
) -> None:
    """Rows in uneven pieces, some of them nothing but padding, then tokens behind the padding."""
    more = random_tokens(len(rows), 6, seed=5)
    tokens, mask = padded(rows, side)
    tokens, mask = torch.cat([tokens, more], dim=1), torch.cat([mask, torch.ones(3, 6)], dim=1)
    cache, logits, start = None, [], 0
    with torch.no_grad():
        for count in (*pieces, 2, 1, 1, 2):
            end = start + count
            part = tokens[:, start:end]
            out = model(part, attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
            cache, start = out.past_key_values, end
            logits.append(out.logits)
    found = torch.cat(logits, dim=1)
    whole = [torch.cat(pair) for pair in zip(rows, more, strict=True)]
    for index, expected in enumerate(rows_alone(model, whole)):
        assert_close(found[index][mask[index] == 1], expected, relative=1e-10)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_of_a_padded_batch_is_that_of_each_row(
    model: Any, rows: list[Any], beams: int
) -> None:
    options = {"max_new_tokens": 9, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    tokens, mask = padded(rows, "left")
    together = model.generate(tokens, attention_mask=mask, **options)
    for index, row in enumerate(rows):
        alone = model.generate(row[None], attention_mask=torch.ones(1, len(row)), **options)
        assert torch.equal(together[index, -9:], alone[0, -9:])
        without = model.generate(
            row[None], attention_mask=torch.ones(1, len(row)), use_cache=False, **options
        )
        assert torch.equal(alone, without)


def test_a_conversation_goes_on_with_its_cache(model: Any) -> None:
    """The cache that one generation returns is where the next one starts."""
    prompt, more = random_tokens(2, 11), random_tokens(2, 5, seed=1)
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    first = model.generate(prompt, attention_mask=torch.ones(2, 11), **options)
    asked = torch.cat([first.sequences, more], dim=1)
    mask = torch.ones(asked.shape)
    cached = model.generate(
        asked, attention_mask=mask, past_key_values=first.past_key_values, **options
    )
    assert torch.equal(
        cached.sequences, model.generate(asked, attention_mask=mask, **options).sequences
    )


def held_bytes(cache: Any) -> list[int]:
    """Of the storages that each layer keeps alive."""
    return [
        sum(value.untyped_storage().nbytes() for value in state.values()) for state in cache.states
    ]


def test_memory_is_constant_except_for_full_attention(model: Any) -> None:
    cache, sizes = None, []
    with torch.no_grad():
        for count in (30, 1, 1, 30, 1):
            tokens = random_tokens(2, count)
            cache = model(tokens, past_key_values=cache, use_cache=True).past_key_values
            sizes.append(held_bytes(cache))
    linear, window, full, nothing = zip(*sizes, strict=True)
    # Rows x KV heads x head dim, in float64: a matrix, 4 earlier keys and values, all of them.
    assert set(linear) == {2 * 2 * 8 * 8 * 8}
    assert set(window) == {2 * 2 * 8 * 8 * 2 * 4}
    assert list(full) == [2 * 2 * 8 * 8 * 2 * tokens for tokens in (30, 31, 32, 62, 63)]
    assert set(nothing) == {0}


def test_rows_of_a_cache_can_be_chosen_and_repeated(model: Any) -> None:
    tokens, more = random_tokens(3, 9), random_tokens(3, 2, seed=1)
    chosen = torch.tensor([2, 0, 0])

    def after(change: Any) -> torch.Tensor:
        with torch.no_grad():
            cache = model(tokens, use_cache=True).past_key_values
            change(cache)
            rows = len(cache.num_tokens)
            return model(more[:1].expand(rows, -1), past_key_values=cache).logits

    plain = after(lambda cache: None)
    plain_rows = plain[chosen]
    assert_close(
        after(lambda cache: cache.batch_select_indices(chosen)), plain_rows, relative=1e-12
    )
    assert_close(after(lambda cache: cache.reorder_cache(chosen)), plain_rows, relative=1e-12)
    repeated = after(lambda cache: cache.batch_repeat_interleave(2))
    assert_close(repeated, plain.repeat_interleave(2, dim=0), relative=1e-12)


def test_a_reset_cache_is_empty(model: Any) -> None:
    tokens = random_tokens(2, 9)
    with torch.no_grad():
        first = model(tokens, use_cache=True)
        first.past_key_values.reset()
        again = model(tokens, past_key_values=first.past_key_values)
    assert torch.equal(again.logits, first.logits)


def test_an_untouched_cache_has_no_rows(model: Any) -> None:
    from models.exported.modeling_synfire import SynfireCache

    cache = SynfireCache(model.config)
    cache.reorder_cache(torch.tensor([0]))
    cache.batch_repeat_interleave(2)
    assert cache.get_seq_length() == 0
    assert not cache.is_compileable
    assert not cache.is_croppable


def test_calls_that_cannot_be_honoured_are_refused(model: Any) -> None:
    from transformers import DynamicCache

    tokens = random_tokens(2, 5)
    cache = model(tokens, use_cache=True).past_key_values
    for options, message in (
        ({}, "input_ids or inputs_embeds must be given"),
        ({"input_ids": tokens, "inputs_embeds": torch.zeros(2, 5, 24)}, "got both or neither"),
        ({"input_ids": tokens, "past_key_values": DynamicCache()},
         r"past_key_values \(DynamicCache\) must be a SynfireCache"),
        ({"input_ids": tokens[:1], "past_key_values": cache},
         r"past_key_values \(2 rows\) must have as many rows as the input: got 1"),
        ({"input_ids": tokens, "attention_mask": torch.ones(2, 4)},
         r"attention_mask \(2, 4\) must cover each row's tokens so far: got \(2, 5\)"),
        ({"input_ids": tokens, "attention_mask": torch.ones(2, 5), "past_key_values": cache},
         r"attention_mask \(2, 5\) must cover each row's tokens so far: got \(2, 10\)"),
        ({"input_ids": tokens, "attention_mask": torch.ones(2, 1, 5, 5)}, "other masks are not"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            model(**options)
    with pytest.raises(ValueError, match=r"crop \(-1\) must not be asked of a SynfireCache"):
        cache.crop(-1)
    with pytest.raises(ValueError, match=r"cache_implementation \(static\) must be left out"):
        model.generate(tokens, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(TypeError, match="position_ids"):
        model(tokens, position_ids=torch.arange(5)[None])
