"""Pattern strings: which mixer and which FFN each layer has. Parsed here and nowhere else.

`F` full softmax attention, `S` sliding window, `L` gated linear, `_` none; `X+Y` two branches on
one input; `d` dense FFN, `e` mixture of experts; `[...]*n` and `x*n` repeat. Blanks only separate.
SpikingBrain-7B is `[L S]*14` with `d*28`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from functools import cache


class MixerKind(Enum):
    """A token mixer; the value is its pattern letter."""

    full = "F"
    sliding_window = "S"
    linear = "L"


class FfnKind(Enum):
    """A feed-forward layer; the value is its pattern letter."""

    dense = "d"
    mixture_of_experts = "e"


Mixers = tuple[MixerKind, ...]
"""The branches of one layer: empty for `_`, one kind for a plain layer, two for `X+Y`."""

_TOKEN = re.compile(r"\s*(\[|\]|\*\s*\d+|[A-Za-z_](?:\s*\+\s*[A-Za-z_])*|\S)")


@dataclass(frozen=True, slots=True)
class LayerPattern:
    """The parsed pattern: one entry a layer in both tuples."""

    mixers: tuple[Mixers, ...]
    ffns: tuple[FfnKind, ...]

    @staticmethod
    @cache
    def parse_mixers(pattern: str) -> tuple[Mixers, ...]:
        """Parse a mixer pattern.

        Raises:
            ValueError: an unknown symbol, an unbalanced bracket or an empty pattern.
        """
        return tuple(_mixers(symbol, pattern) for symbol in _expand(pattern, "mixers"))

    @staticmethod
    @cache
    def parse_ffns(pattern: str) -> tuple[FfnKind, ...]:
        """Parse an FFN pattern; errors as `parse_mixers`."""
        return tuple(_ffn(symbol, pattern) for symbol in _expand(pattern, "ffns"))

    def describe(self) -> str:
        """One readable line: mixers, then FFNs, runs compressed."""
        letters = ["+".join(kind.value for kind in layer) or "_" for layer in self.mixers]
        return f"mixers {compress(letters)} | ffns {compress([f.value for f in self.ffns])}"


def _expand(pattern: str, field: str) -> list[str]:
    """Expand brackets and repeats into one symbol a layer."""
    stack: list[list[str]] = [[]]
    last: list[str] = []
    for token in _TOKEN.findall(pattern.strip()):
        if token == "[":
            stack.append([])
            last = []
        elif token == "]":
            if len(stack) == 1:
                raise ValueError(f"{field} ({pattern!r}) must have a [ for each ]. Remove one ].")
            last = stack.pop()
            stack[-1].extend(last)
        elif token.startswith("*") and len(token) > 1:
            if not last:
                raise ValueError(f"{field} ({pattern!r}) must repeat a symbol or [...]: {token}.")
            times = int(token[1:])
            if times < 1:
                raise ValueError(f"{field} ({pattern!r}) must repeat at least once: got {times}.")
            stack[-1].extend(last * (times - 1))
            last = []
        else:
            last = [re.sub(r"\s", "", token)]
            stack[-1].extend(last)
    if len(stack) > 1:
        raise ValueError(f"{field} ({pattern!r}) must close every [. Add a ].")
    if not stack[0]:
        raise ValueError(f"{field} ({pattern!r}) must have at least one layer.")
    return stack[0]


def _mixers(symbol: str, pattern: str) -> Mixers:
    if symbol == "_":
        return ()
    known = {kind.value: kind for kind in MixerKind}
    unknown = [letter for letter in symbol.split("+") if letter not in known]
    if unknown:
        raise ValueError(
            f"mixers ({pattern!r}) must use F, S, L, _, X+Y and [...]*n: got {symbol!r}."
        )
    branches = tuple(known[letter] for letter in symbol.split("+"))
    if len(branches) > 2 or len(set(branches)) != len(branches):
        raise ValueError(f"mixers ({pattern!r}) must join two different branches: got {symbol!r}.")
    return branches


def _ffn(symbol: str, pattern: str) -> FfnKind:
    known = {kind.value: kind for kind in FfnKind}
    if symbol not in known:
        raise ValueError(
            f"ffns ({pattern!r}) must use d and e, repeated by [...]*n: got {symbol!r}."
        )
    return known[symbol]


def compress(letters: list[str]) -> str:
    """The pattern string of one symbol a layer: one repeated period if there is one, else runs."""
    for period in range(1, len(letters) // 2 + 1):
        times, rest = divmod(len(letters), period)
        if not rest and letters == letters[:period] * times:
            body = letters[0] if period == 1 else f"[{_runs(letters[:period])}]"
            return f"{body}*{times}"
    return _runs(letters)


def _runs(letters: list[str]) -> str:
    parts: list[str] = []
    start = 0
    for index in range(1, len(letters) + 1):
        if index == len(letters) or letters[index] != letters[start]:
            count = index - start
            parts.append(letters[start] + (f"*{count}" if count > 1 else ""))
            start = index
    return " ".join(parts)
