"""Decoding with the cache of an exported model: windows, memory, rows, what comes next."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.generation import generate
from tests.models.exported.folders import case, logits_of, open_folder, save
from tests.models.tiny import random_tokens, tiny_model
from tests.support.closeness import assert_close

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An exported model with all four mixers."""
    return open_folder(save(tiny_model(case("all mixers")), tmp_path_factory.mktemp("a") / "out"))


@pytest.mark.parametrize(
    "changes",
    [
        {"mixers": "S L S F", "window_includes_self": False},
        {"mixers": "S*4", "window_tokens": 1},
        {"mixers": "S L S+L F", "window_tokens": 200},
        {"mixers": "S L S F", "window_tokens": 1, "window_includes_self": False},
    ],
)
def test_windows_of_any_length_in_pieces_of_any_length(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_model(case("all mixers", **changes))
    twin = open_folder(save(model, tmp_path / "out"))
    tokens = random_tokens(2, 60)
    cache, logits, start = None, [], 0
    for count in (1, 1, 3, 20, 2, 33):
        with torch.no_grad():
            part = tokens[:, start : start + count]
            out = twin(part, past_key_values=cache, use_cache=True)
        cache, start = out.past_key_values, start + count
        logits.append(out.logits)
    assert_close(torch.cat(logits, dim=1), logits_of(model, tokens), relative=1e-10)
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones(2, 60)}
    assert torch.equal(twin.generate(tokens, **options), generate(model, tokens, max_new_tokens=8))


def test_masks_exist_for_a_block_of_queries_and_the_keys_that_it_sees(
    twin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = sys.modules[type(twin).__module__.replace("modeling", "kernels")]
    tokens, shapes = random_tokens(2, 70), []
    with torch.no_grad():
        expected = twin(tokens).logits
    attend_all = kernels.attend_all

    def spy(*args: Tensor, **options: Any) -> Tensor:
        shapes.append(tuple(options["visible"].shape[2:]))
        out: Tensor = attend_all(*args, **options)
        return out

    monkeypatch.setattr(kernels, "QUERY_BLOCK", 16)
    monkeypatch.setattr(kernels, "attend_all", spy)
    with torch.no_grad():
        first = twin(tokens[:, :37], use_cache=True)
        second = twin(tokens[:, 37:], past_key_values=first.past_key_values)
    assert_close(torch.cat([first.logits, second.logits], dim=1), expected, relative=1e-10)
    # Layer S with its window of 5 sees 4 keys more; a block of layer F all up to its last query.
    assert shapes == [
        *[(16, 16), (16, 20), (5, 9)], *[(16, 16), (16, 32), (5, 37)],
        *[(16, 20), (16, 20), (1, 5)], *[(16, 53), (16, 69), (1, 70)],
    ]  # fmt: skip


def test_bytes_that_each_layer_keeps(twin: Any) -> None:
    """Of whole storages, so that no view keeps a long prompt alive."""
    cache, sizes = None, []
    for count in (30, 1, 1, 30, 1):
        with torch.no_grad():
            cache = twin(random_tokens(2, count), past_key_values=cache, use_cache=True)[1]
        sizes.append([sum(x.untyped_storage().nbytes() for x in s.values()) for s in cache.states])
    linear, window, full, nothing = zip(*sizes, strict=True)
    # Rows x KV heads x head dim x 8 bytes: a matrix, 4 earlier keys and values, all of them.
    token = 2 * 2 * 8 * 8
    assert set(linear) == {token * 8}
    assert set(window) == {token * 2 * 4}
    assert list(full) == [token * 2 * seen for seen in (30, 31, 32, 62, 63)]
    assert set(nothing) == {0}


def test_a_conversation_goes_on_with_the_cache_of_its_first_part(twin: Any) -> None:
    prompt, more = random_tokens(2, 11), random_tokens(2, 5, seed=1)
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    first = twin.generate(prompt, attention_mask=torch.ones(2, 11), **options)
    asked = torch.cat([first.sequences, more], dim=1)
    options["attention_mask"] = torch.ones(asked.shape)
    seen = first.past_key_values.get_seq_length()
    cached = twin.generate(asked, past_key_values=first.past_key_values, **options)
    assert torch.equal(cached.sequences, twin.generate(asked, **options).sequences)
    assert (seen, cached.past_key_values.get_seq_length()) == (14, 11 + 4 + 5 + 3)


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ],
    ids=["reordered", "selected", "repeated"],
)
def test_rows_of_a_cache(twin: Any, change: Callable[[Any], None], rows: list[int]) -> None:
    """Each row keeps its own number of tokens: they differ by their padding."""
    tokens, after = random_tokens(3, 9), random_tokens(1, 2, seed=1)
    mask = torch.tensor([[0] * pads + [1] * (9 - pads) for pads in (0, 3, 7)])
    with torch.no_grad():
        cache = twin(tokens, attention_mask=mask, use_cache=True).past_key_values
        change(cache)
        found = twin(after.expand(len(rows), -1), past_key_values=cache).logits
        for index, row in enumerate(rows):
            alone = torch.cat([tokens[row : row + 1, mask[row] == 1], after], dim=1)
            expected = twin(alone).logits[:, -2:]
            assert_close(found[index : index + 1], expected, relative=1e-10)


def test_a_cache_that_saw_nothing(twin: Any) -> None:
    cache = twin(random_tokens(1, 1), use_cache=True).past_key_values
    cache.reset()
    cache.reorder_cache(torch.tensor([0]))
    cache.batch_repeat_interleave(2)
    assert cache.num_tokens is None
    # What `generate` asks before it compiles, or takes the last token back.
    assert not cache.is_compileable
    assert not cache.is_croppable


def test_padding_on_the_right_needs_no_mask(twin: Any) -> None:
    """As evaluation harnesses score continuations: pad right, pass no mask, cut the logits."""
    lengths = (20, 7, 13)
    tokens = random_tokens(3, 20)
    with torch.no_grad():
        scores = twin(tokens).logits.log_softmax(dim=-1)
        for row, length in enumerate(lengths):
            alone = twin(tokens[row : row + 1, :length]).logits.log_softmax(dim=-1)
            assert_close(scores[row : row + 1, :length], alone, relative=1e-10)
