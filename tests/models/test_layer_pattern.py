from __future__ import annotations

import pytest

from models.layer_pattern import FfnKind, LayerPattern, MixerKind

F, S, L = (MixerKind.full,), (MixerKind.sliding_window,), (MixerKind.linear,)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("F", [F]),
        ("L S _", [L, S, ()]),
        ("LSLS", [L, S, L, S]),
        ("F*3", [F, F, F]),
        ("L S*2", [L, S, S]),
        ("[L S]*2", [L, S, L, S]),
        ("[[L S]*2 F]*2 _", [L, S, L, S, F, L, S, L, S, F, ()]),
        ("L+S L + F", [(MixerKind.linear, MixerKind.sliding_window), (MixerKind.linear, F[0])]),
        ("L+S*2", [(MixerKind.linear, MixerKind.sliding_window)] * 2),
    ],
)
def test_mixer_patterns_expand_in_order(
    pattern: str, expected: list[tuple[MixerKind, ...]]
) -> None:
    assert list(LayerPattern.parse_mixers(pattern)) == expected


def test_the_patterns_of_both_spikingbrain_models_have_28_layers() -> None:
    assert LayerPattern.parse_mixers("[L S]*14") == (L, S) * 14
    wide = LayerPattern.parse_mixers("[[L+S]*6 L+F]*4")
    assert [index for index, layer in enumerate(wide) if MixerKind.full in layer] == [6, 13, 20, 27]
    ffns = LayerPattern.parse_ffns("d*3 e d e d e d e d e*17")
    dense = [index + 1 for index, kind in enumerate(ffns) if kind is FfnKind.dense]
    assert dense == [1, 2, 3, 5, 7, 9, 11]
    assert len(ffns) == 28


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("", "at least one layer"),
        ("[L S", r"close every \["),
        ("L S]", r"have a \[ for each \]"),
        ("*2", "must repeat a symbol"),
        ("[]*2", "must repeat a symbol"),
        ("L*2*3", "must repeat a symbol"),
        ("L*0", "at least once: got 0"),
        ("L Q", "got 'Q'"),
        ("L ?", r"got '\?'"),
        ("L+L", "two different branches"),
        ("L+S+F", "two different branches"),
        ("L+_", r"got 'L\+_'"),
    ],
)
def test_a_bad_mixer_pattern_is_refused_with_the_reason(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerPattern.parse_mixers(pattern)


def test_an_unknown_ffn_symbol_is_refused() -> None:
    with pytest.raises(ValueError, match="must use d and e.*got 'x'"):
        LayerPattern.parse_ffns("d x")


@pytest.mark.parametrize(
    ("mixers", "ffns", "text"),
    [
        ("LSLS", "d*4", "mixers [L S]*2 | ffns d*4"),
        ("F*4", "d*4", "mixers F*4 | ffns d*4"),
        ("L L S F", "d d e d", "mixers L*2 S F | ffns d*2 e d"),
        ("L+S L+F _", "d*3", "mixers L+S L+F _ | ffns d*3"),
    ],
)
def test_describe_is_short_and_parses_back(mixers: str, ffns: str, text: str) -> None:
    pattern = LayerPattern(
        mixers=LayerPattern.parse_mixers(mixers), ffns=LayerPattern.parse_ffns(ffns)
    )
    assert pattern.describe() == text
    left, right = text.split(" | ")
    assert LayerPattern.parse_mixers(left.removeprefix("mixers ")) == pattern.mixers
    assert LayerPattern.parse_ffns(right.removeprefix("ffns ")) == pattern.ffns
