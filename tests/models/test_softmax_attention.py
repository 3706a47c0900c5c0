from __future__ import annotations

import pytest
import torch

from models.layer_pattern import MixerKind
from models.mixer import Mixer
from models.sequence import SequenceContext
from models.softmax_attention import KeyValueCache, SoftmaxAttention
from tests.models.tiny import packed, tiny_config, tiny_model
from tests.support.closeness import assert_close


def _mixer(window: int = 5, *, kind: MixerKind = MixerKind.sliding_window) -> Mixer:
    config = tiny_config(mixers=kind.value, ffns="d", window_tokens=window, qk_norm=True)
    mixer = tiny_model(config).blocks[0].mixer
    assert mixer is not None
    assert isinstance(mixer.branches[0].core, SoftmaxAttention)
    return mixer


def _x(tokens: int, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, tokens, 24, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize(("window", "same"), [(12, True), (99, True), (11, False)])
def test_a_window_of_the_whole_sequence_is_full_attention(window: int, same: bool) -> None:
    sequence, x = SequenceContext.one_document_per_row(2, 12), _x(12)
    full = _mixer(window, kind=MixerKind.full)(x, sequence)
    windowed = _mixer(window)(x, sequence)
    if same:
        assert_close(windowed, full, relative=1e-12)
    else:
        assert_close(windowed[:, :11], full[:, :11], relative=1e-12)
        assert (windowed[:, 11] - full[:, 11]).abs().max() > 1e-6


def test_packed_documents_attend_as_if_alone() -> None:
    mixer, x, lengths = _mixer(), _x(13), [[4, 9], [13]]
    together = mixer(x, packed(lengths))
    for row, documents in enumerate(lengths):
        start = 0
        for length in documents:
            part = x[row : row + 1, start : start + length]
            alone = mixer(part, SequenceContext.one_document_per_row(1, length))
            assert_close(together[row : row + 1, start : start + length], alone, relative=1e-12)
            start += length


def test_the_first_token_of_a_document_sees_itself_only() -> None:
    mixer, x = _mixer(), _x(6)
    (heads,) = mixer.attend(x, packed([[3, 3], [6]]))
    _, _, v = mixer.branches[0].projections.project(x)
    assert_close(heads[0, 3], v[0, 3].repeat_interleave(2, dim=0), relative=1e-12)


@pytest.mark.parametrize("chunks", [[1] * 12, [5, 1, 6], [12], [3, 3, 1, 1, 4], [1, 11]])
@pytest.mark.parametrize("window", [1, 2, 5, 30])
def test_extending_in_any_chunks_is_the_full_forward(window: int, chunks: list[int]) -> None:
    for kind in (MixerKind.sliding_window, MixerKind.full):
        mixer, x = _mixer(window, kind=kind), _x(12)
        expected = mixer(x, SequenceContext.one_document_per_row(2, 12))
        cache, start, parts = None, 0, []
        with torch.no_grad():
            for count in chunks:
                out, cache = mixer.extend(x[:, start : start + count], cache)
                parts.append(out)
                start += count
        assert_close(torch.cat(parts, dim=1), expected, relative=1e-12)


def test_a_ring_never_holds_more_than_its_window_and_a_full_cache_doubles() -> None:
    ring, full = KeyValueCache(4), KeyValueCache(None)
    sizes = []
    for step in range(20):
        key = torch.full((1, 1, 2, 8), float(step))
        ring_keys, _ = ring.append(key, key)
        full_keys, _ = full.append(key, key)
        assert ring_keys[0, :, 0, 0].sort().values.tolist() == list(
            range(max(0, step - 3), step + 1)
        )
        assert full_keys[0, :, 0, 0].tolist() == list(range(step + 1))
        sizes.append((ring.num_bytes, full.num_bytes))
    per_token = 2 * 2 * 8 * 4
    assert max(size for size, _ in sizes) == 4 * per_token
    assert sorted({size // per_token for _, size in sizes}) == [1, 2, 4, 8, 16, 32]


def test_a_copied_cache_is_independent() -> None:
    cache = KeyValueCache(3)
    key = torch.ones(1, 3, 1, 2)
    cache.append(key, key)
    twin = cache.copy()
    cache.append(key[:, :1] * 9, key[:, :1] * 9)
    assert twin.num_seen == 3
    assert twin.keys is not None
    assert float(twin.keys.max()) == 1.0
    assert KeyValueCache(None).copy().keys is None
