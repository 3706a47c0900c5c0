"""Plan of a conversion: for every target tensor its origin and how to load it.

Reads nothing but names, shapes and dtypes until a tensor's `load` is called. What sample text fits
(head norms, aligned gates, centred key biases) comes from `attention_transfer` as an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from models.config import ModelConfig
from models.conversion.huggingface import TensorSource
from models.conversion.new_parameters import ConversionOptions, KeyBias, gate_bias_of, xavier
from models.conversion.source_checks import becomes_linear, check_source, check_target
from models.conversion.source_config import read_config, read_format
from models.conversion.weight_map import (
    GATE_BIAS,
    GATE_DOWN,
    GATE_UP,
    HEAD_NORM,
    KEY_BIAS,
    mixer_parameter,
    theirs,
)
from models.layouts import is_new_parameter, parameter_layouts


class OriginKind(Enum):
    """Where a target tensor comes from."""

    copied = "copied"
    reshaped = "reshaped"
    scaled = "scaled"
    new = "new"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a target tensor comes from: source tensors by their own names, and how."""

    kind: OriginKind
    sources: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class TargetTensor:
    """One tensor of the target; `load` gives `shape` and `dtype`."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    origin: Origin
    load: Callable[[], Tensor] = field(repr=False)


def plan_conversion(
    source: TensorSource,
    target: ModelConfig,
    options: ConversionOptions | None = None,
    *,
    fitted: Mapping[str, tuple[Tensor, str]] | None = None,
) -> list[TargetTensor]:
    """Explain every tensor of `target`, in the order of the model.

    Args:
        source: a checkpoint in any format that `read_config` reads.
        target: the same sizes, possibly other mixers.
        options: how new parameters start.
        fitted: values from sample text by target name, each with a note for the certificate.

    Raises:
        ValueError: sizes that differ, tensors that are missing, unknown or misshapen, a layer that
            cannot become the other kind.
    """
    options = options or ConversionOptions()
    config = read_config(source.config)
    format = read_format(source.config)
    check_target(config, target)
    check_source(source, config, format)
    planner = _Planner(source, target, options, fitted or {})
    return [
        planner.plan(name, layout.global_shape)
        for name, layout in parameter_layouts(target).items()
    ]


def unused_tensors(source: TensorSource, plan: list[TargetTensor]) -> list[str]:
    """Source tensors that nothing in the plan reads."""
    used = {name for tensor in plan for name in tensor.origin.sources}
    return sorted(set(source.names()) - used)


class _Planner:
    """Explains one target tensor at a time."""

    def __init__(
        self,
        source: TensorSource,
        target: ModelConfig,
        options: ConversionOptions,
        fitted: Mapping[str, tuple[Tensor, str]],
    ) -> None:
        self._source = source
        self._config = read_config(source.config)
        self._format = read_format(source.config)
        self._target = target
        self._options = options
        self._fitted = fitted
        stored = source.dtype(next(iter(source.names())))
        self._new_dtype = torch.promote_types(stored, torch.float32)
        self._bias = gate_bias_of(options.gate_init, target.linear.gate_logit_normalizer)
        self._kept = set(parameter_layouts(self._config))

    def plan(self, name: str, shape: tuple[int, ...]) -> TargetTensor:
        """The origin of one tensor."""
        known = self._known_source(name)
        if name in self._fitted:
            value, note = self._fitted[name]
            kind = OriginKind.new if is_new_parameter(name) else OriginKind.scaled
            dtype = value.dtype if known is None else self._source.dtype(known)
            origin = Origin(kind, () if known is None else (known,), note)
            return TargetTensor(name, shape, dtype, origin, lambda: value.to(dtype))
        if known is None:
            return self._new(name, shape)
        dtype = self._source.dtype(known)
        if self._drops_key_bias(name):
            origin = Origin(OriginKind.scaled, (known,), "by 0 (key_bias=zero)")
            return TargetTensor(name, shape, dtype, origin, lambda: torch.zeros(shape, dtype=dtype))
        note = "the tied embedding" if name == "head.weight" and name not in self._kept else ""
        origin = Origin(OriginKind.copied, (known,), note)
        return TargetTensor(name, shape, dtype, origin, lambda: self._source.load(known))

    def _known_source(self, name: str) -> str | None:
        """The source tensor that the target tensor reuses; None for a new one."""
        if name in self._kept:
            return theirs(name, self._format)
        if name == "head.weight":
            return theirs("embedding.weight", self._format)
        return None

    def _drops_key_bias(self, name: str) -> bool:
        place = mixer_parameter(name)
        if place is None or place[1] != KEY_BIAS or self._options.key_bias is not KeyBias.zero:
            return False
        return becomes_linear(self._config, self._target)[place[0]]

    def _new(self, name: str, shape: tuple[int, ...]) -> TargetTensor:
        place = mixer_parameter(name)
        assert place is not None, f"unexplained tensor {name}"
        dtype, seed, bias = self._new_dtype, self._options.seed, self._bias
        starts: dict[str, tuple[str, Callable[[], Tensor]]] = {
            GATE_DOWN: ("Xavier-uniform", lambda: xavier(name, shape, seed).to(dtype)),
            GATE_UP: ("zeros", lambda: torch.zeros(shape, dtype=dtype)),
            GATE_BIAS: (f"constant {bias:.6g}", lambda: torch.full(shape, bias, dtype=dtype)),
            HEAD_NORM: ("ones", lambda: torch.ones(shape, dtype=dtype)),
        }
        note, load = starts[place[1]]
        return TargetTensor(name, shape, dtype, Origin(OriginKind.new, (), note), load)
