"""The config of a Synfire model in transformers.

Sizes and switches have the names of Synfire's own config, as `config.json` lists them all.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig


class SynfireConfig(PreTrainedConfig):
    """What `config.json` says.

    Args:
        layer_mixers: per layer `F` (full attention), `S` (sliding window), `L` (gated linear),
            `X+Y` (two of them on one input) or `_` (none).
        layer_ffns: per layer `d` (dense) or `e` (mixture of experts).
        rope: `theta`, `type` and the numbers of that type.
        linear: the `L` mixers.
        branches: how `X+Y` is projected, normalised and merged.
        sinks: learned tokens that all others attend to; `num_tokens` 0 is none.
        moe: the `e` layers.
        spiking: `k`, `blend` and `max_count` of the adaptive-threshold neurons at the inputs of
            projections; None leaves activations continuous.
        **values: all other sizes, token ids, and what every config has.
    """

    model_type = "synfire"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(  # noqa: PLR0913 - one group of keys each
        self,
        *,
        layer_mixers: tuple[str, ...] = (),
        layer_ffns: tuple[str, ...] = (),
        rope: dict[str, Any] | None = None,
        linear: dict[str, Any] | None = None,
        branches: dict[str, Any] | None = None,
        sinks: dict[str, Any] | None = None,
        moe: dict[str, Any] | None = None,
        spiking: dict[str, Any] | None = None,
        **values: Any,
    ) -> None:
        if len(layer_mixers) != len(layer_ffns):
            raise ValueError(
                f"layer_ffns ({len(layer_ffns)} layers) must have as many layers as layer_mixers: "
                f"got {len(layer_mixers)}."
            )
        self.layer_mixers = list(layer_mixers)
        self.layer_ffns = list(layer_ffns)
        self.rope = rope or {}
        self.linear = linear or {}
        self.branches = branches or {}
        self.sinks = sinks or {}
        self.moe = moe or {}
        self.spiking = spiking
        values["num_hidden_layers"] = len(layer_mixers)
        super().__init__(**values)
