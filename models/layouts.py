"""Every parameter of a model by name: its global shape and how ranks may share it.

The one table that checkpoint boxes, gradient sums, clipping, weight counting, conversion and export
read. Computed from the config alone; builds no module. Patterns and shapes must agree with
`models.model`, which a test checks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from models.config import ModelConfig
from models.layer_pattern import FfnKind, MixerKind, Mixers
from models.layers import ParamLayout


def parameter_layouts(
    config: ModelConfig, *, sequence_parallel: bool = False
) -> dict[str, ParamLayout]:
    """Layouts of all parameters, in the order of the model.

    With `sequence_parallel` each tp rank holds a part of the tokens outside the projections, so
    that replicated parameters there (norms, output biases) have partial gradients too.

    Raises:
        ValueError: a layer kind that this release does not build.
    """
    table = _whole_rows(config)
    if not sequence_parallel:
        return table
    return {
        name: replace(layout, partial_axes=("tp",)) if layout.tp_dim is None else layout
        for name, layout in table.items()
    }


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Global shapes of all parameters; errors as `parameter_layouts`."""
    return {name: layout.global_shape for name, layout in parameter_layouts(config).items()}


def _whole_rows(config: ModelConfig) -> dict[str, ParamLayout]:
    refuse_unsupported(config)
    table = {"embedding.weight": ParamLayout((config.vocab_size, config.hidden_size), tp_dim=0)}
    for index, mixers in enumerate(config.layers.mixers):
        for name, layout in _block(config, mixers):
            table[f"blocks.{index}.{name}"] = layout
    table["final_norm.weight"] = _replicated(config.hidden_size)
    if not config.tie_word_embeddings:
        table["head.weight"] = ParamLayout((config.vocab_size, config.hidden_size), tp_dim=0)
    return table


def refuse_unsupported(config: ModelConfig) -> None:
    """Refuse, by name, patterns that parse but that no layer here implements yet.

    Raises:
        ValueError: naming the field and the symbol.
    """
    for mixers in config.layers.mixers:
        if len(mixers) > 1:
            symbol = "+".join(kind.value for kind in mixers)
            raise ValueError(
                f"mixers ({config.mixers}) must have one mixer a layer: got {symbol}, and parallel "
                "branches are not in this release. Use F, S, L or _."
            )
    if FfnKind.mixture_of_experts in config.layers.ffns:
        raise ValueError(
            f"ffns ({config.ffns}) must be all d: got e, and mixture of experts is not in this "
            "release. Use d."
        )


def is_new_parameter(name: str) -> bool:
    """Whether conversion adds this parameter to a Transformer's (gates and head norms)."""
    return ".mixer.gate_" in name or ".mixer.head_norm." in name


def _block(config: ModelConfig, mixers: Mixers) -> Iterator[tuple[str, ParamLayout]]:
    if mixers:
        yield "mixer_norm.weight", _replicated(config.hidden_size)
        yield from _mixer(config, mixers[0])
    yield "ffn_norm.weight", _replicated(config.hidden_size)
    for name in ("gate_proj", "up_proj"):
        yield from _column(
            f"ffn.{name}", config.hidden_size, config.intermediate_size, config.ffn_bias
        )
    yield from _row("ffn.down_proj", config.intermediate_size, config.hidden_size, config.ffn_bias)


def _mixer(config: ModelConfig, kind: MixerKind) -> Iterator[tuple[str, ParamLayout]]:
    hidden, dim = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * dim, config.num_key_value_heads * dim
    for name, out in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        yield from _column(f"mixer.{name}", hidden, out, config.qkv_bias)
    yield from _row("mixer.o_proj", queries, hidden, config.output_bias)
    if config.qk_norm:
        yield "mixer.q_norm.weight", _shared_by_heads(dim)
        yield "mixer.k_norm.weight", _shared_by_heads(dim)
    if kind is MixerKind.linear:
        rank = config.linear.gate_low_rank_dim
        yield "mixer.gate_down.weight", _shared_by_heads(rank, hidden)
        yield from _column("mixer.gate_up", rank, keys, True)
        yield "mixer.head_norm.weight", _shared_by_heads(dim)


def _column(name: str, size: int, out: int, bias: bool) -> Iterator[tuple[str, ParamLayout]]:
    yield f"{name}.weight", ParamLayout((out, size), tp_dim=0)
    if bias:
        yield f"{name}.bias", ParamLayout((out,), tp_dim=0)


def _row(name: str, size: int, out: int, bias: bool) -> Iterator[tuple[str, ParamLayout]]:
    yield f"{name}.weight", ParamLayout((out, size), tp_dim=1)
    if bias:
        yield f"{name}.bias", _replicated(out)


def _replicated(*shape: int) -> ParamLayout:
    return ParamLayout(shape, replicated_axes=("tp",))


def _shared_by_heads(*shape: int) -> ParamLayout:
    """Held whole by each tp rank, but each sees only its own heads' part of the gradient."""
    return ParamLayout(shape, partial_axes=("tp",), replicated_axes=("tp",))
