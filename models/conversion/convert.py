"""Plan of a conversion: for every target tensor its origin and how to load it.

Reads nothing but names, shapes and dtypes until a tensor's `load` is called. What sample text fits
(head norms, aligned gates, centred key biases) comes from `attention_transfer` as an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from models.config import ModelConfig
from models.conversion.huggingface import TensorSource
from models.conversion.new_parameters import (
    ConversionOptions,
    KeyBias,
    gate_bias_of,
    normal,
    xavier,
)
from models.conversion.source_checks import (
    becomes_new,
    check_source,
    check_target,
    linear_key_bias,
)
from models.conversion.source_config import read_config, read_format
from models.conversion.target_tensor import Origin, OriginKind, TargetTensor
from models.conversion.upcycling import ExpertPlanner
from models.conversion.weight_map import (
    GATE_BIAS,
    GATE_DOWN,
    GATE_UP,
    HEAD_NORM,
    MERGE,
    OUTPUT_NORM,
    SINKS,
    theirs,
    transformer_name,
)
from models.layouts import is_new_parameter, parameter_layouts
from models.mixer_config import SinkInit

_SINK_NOISE = 0.1
"""Of `initializer_range`, on copies of one embedding."""


def plan_conversion(
    source: TensorSource,
    target: ModelConfig,
    options: ConversionOptions | None = None,
    *,
    fitted: Mapping[str, tuple[Tensor, str]] | None = None,
    scales: Mapping[int, float] | None = None,
) -> list[TargetTensor]:
    """Explain every tensor of `target`, in the order of the model.

    Args:
        source: a checkpoint in any format that `read_config` reads.
        target: the same sizes, possibly other mixers and experts.
        options: how new parameters start.
        fitted: values from sample text by target name, each with a note for the certificate.
        scales: measured factors of upcycled layers.

    Raises:
        ValueError: sizes that differ, tensors that are missing, unknown or misshapen, a layer that
            cannot become the other kind.
    """
    options = options or ConversionOptions()
    config = read_config(source.config)
    format = read_format(source.config)
    check_target(config, target)
    check_source(source, config, format)
    planner = _Planner(source, target, options, fitted or {}, scales or {})
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
        scales: Mapping[int, float],
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
        self._linear_biases = {
            linear_key_bias(target, layer)
            for layer, is_new in enumerate(becomes_new(self._config, target))
            if is_new
        }
        self._experts = ExpertPlanner(source, target, options, scales, self._new_dtype)

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
        if name not in self._kept and ".ffn." in name:
            return self._experts.expert(name, shape, known)
        dtype = self._source.dtype(known)
        if self._options.key_bias is KeyBias.zero and name in self._linear_biases:
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
        if is_new_parameter(name):
            return None
        return theirs(transformer_name(name), self._format)

    def _new(self, name: str, shape: tuple[int, ...]) -> TargetTensor:
        if ".router." in name:
            return self._experts.router(name, shape)
        if name == SINKS:
            return self._sinks(shape)
        dtype, seed, bias = self._new_dtype, self._options.seed, self._bias
        ones = ("ones", lambda: torch.ones(shape, dtype=dtype))
        starts: dict[str, tuple[str, Callable[[], Tensor]]] = {
            GATE_DOWN: ("Xavier-uniform", lambda: xavier(name, shape, seed).to(dtype)),
            GATE_UP: ("zeros", lambda: torch.zeros(shape, dtype=dtype)),
            GATE_BIAS: (f"constant {bias:.6g}", lambda: torch.full(shape, bias, dtype=dtype)),
            **dict.fromkeys((HEAD_NORM, OUTPUT_NORM, MERGE), ones),
        }
        note, load = starts[".".join(name.split(".")[-2:])]
        return TargetTensor(name, shape, dtype, Origin(OriginKind.new, (), note), load)

    def _sinks(self, shape: tuple[int, ...]) -> TargetTensor:
        """Drawn, or copies of the BOS token's embedding with a little noise, so that they part."""
        dtype, seed, std = self._new_dtype, self._options.seed, self._target.initializer_range
        if self._target.sinks.init is SinkInit.random:
            origin = Origin(OriginKind.new, (), f"normal, standard deviation {std:g}")
            return TargetTensor(
                SINKS, shape, dtype, origin, lambda: normal(SINKS, shape, seed, std).to(dtype)
            )
        known = theirs("embedding.weight", self._format)
        token = self._target.bos_token_id
        assert known is not None

        def load() -> Tensor:
            noise = normal(SINKS, shape, seed, _SINK_NOISE * std)
            return self._source.load(known)[token].to(dtype) + noise.to(dtype)

        note = f"embedding of token {token}, noise of standard deviation {_SINK_NOISE * std:g}"
        return TargetTensor(SINKS, shape, dtype, Origin(OriginKind.new, (known,), note), load)
