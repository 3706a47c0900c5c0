"""Names choose kernels; a wrong name or a missing library is one clear error."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from models import reference
from models.kernels import (
    KernelSet,
    blocked,
    chunked,
    default_kernels,
    fla,
    flash,
    flex,
    kernel_set,
)


def test_the_default_is_plain_torch() -> None:
    kernels = default_kernels()
    assert kernels == KernelSet(
        linear_attention=chunked.linear_attention,
        softmax_attention=blocked.softmax_attention,
        names={"linear_attention": "chunked", "softmax_attention": "blocked"},
    )


def test_the_slow_definitions_can_be_chosen() -> None:
    kernels = kernel_set(linear="reference", softmax="reference")
    assert kernels.linear_attention is reference.linear_attention
    assert kernels.softmax_attention is reference.softmax_attention
    assert set(kernels.names.values()) == {"reference"}


@pytest.mark.parametrize(
    ("linear", "softmax", "message"),
    [
        ("flash", "blocked", r"linear \('flash'\) must be one of chunked, fla, reference"),
        ("chunked", "sdpa", r"softmax \('sdpa'\) must be one of blocked, flash_attn, flex, ref"),
    ],
)
def test_an_unknown_name_is_refused(linear: str, softmax: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernel_set(linear=linear, softmax=softmax)


@pytest.mark.parametrize(
    ("linear", "softmax", "library", "message"),
    [
        ("fla", "blocked", "fla.ops.gla", r"linear \('fla'\) must have flash-linear-attention"),
        ("chunked", "flash_attn", "flash_attn", r"softmax \('flash_attn'\) must have flash-attn"),
        ("chunked", "flex", "triton", r"softmax \('flex'\) must have torch's flex attention"),
    ],
)
def test_a_missing_library_is_named_with_the_way_out(
    linear: str, softmax: str, library: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ValueError, match=message + r".*choose (linear|softmax)="):
        kernel_set(linear=linear, softmax=softmax)


@pytest.mark.parametrize(
    ("linear", "softmax", "chosen"),
    [
        ("fla", "blocked", fla.linear_attention),
        ("chunked", "flash_attn", flash.softmax_attention),
        ("chunked", "flex", flex.softmax_attention),
    ],
)
def test_a_library_at_hand_is_used(
    linear: str, softmax: str, chosen: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (fla, flash, flex):
        monkeypatch.setattr(module, "require", lambda: None)
    kernels = kernel_set(linear=linear, softmax=softmax)
    assert chosen in (kernels.linear_attention, kernels.softmax_attention)
    assert kernels.names == {"linear_attention": linear, "softmax_attention": softmax}
