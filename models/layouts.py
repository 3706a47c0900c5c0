"""Every parameter of a model by name: its global shape and how ranks may share it.

The one table that checkpoint boxes, gradient sums, clipping, weight counting, conversion and export
read. Computed from the config alone; builds no module. Patterns and shapes must agree with
`models.model`, which a test checks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from models.config import ModelConfig
from models.expert_config import Balance
from models.layer_pattern import FfnKind, MixerKind, Mixers
from models.layers import ParamLayout
from models.mixer_config import BranchMerge, BranchNorm, BranchProjections, GateKind


def parameter_layouts(
    config: ModelConfig, *, sequence_parallel: bool = False
) -> dict[str, ParamLayout]:
    """Layouts of all parameters, in the order of the model.

    With `sequence_parallel` each tp rank holds a part of the tokens outside the projections, so
    that replicated parameters there (norms, output biases) have partial gradients too.
    """
    table = _whole_rows(config)
    if not sequence_parallel:
        return table
    return {
        name: replace(layout, partial_axes=("tp",)) if layout.tp_dim is None else layout
        for name, layout in table.items()
    }


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Global shapes of all parameters."""
    return {name: layout.global_shape for name, layout in parameter_layouts(config).items()}


def _whole_rows(config: ModelConfig) -> dict[str, ParamLayout]:
    table = {"embedding.weight": ParamLayout((config.vocab_size, config.hidden_size), tp_dim=0)}
    if config.uses_sinks:
        table["sinks.weight"] = _replicated(config.sinks.num_tokens, config.hidden_size)
    layers = zip(config.layers.mixers, config.layers.ffns, strict=True)
    for index, (mixers, ffn) in enumerate(layers):
        for name, layout in _block(config, mixers, ffn):
            table[f"blocks.{index}.{name}"] = layout
    table["final_norm.weight"] = _replicated(config.hidden_size)
    if not config.tie_word_embeddings:
        table["head.weight"] = ParamLayout((config.vocab_size, config.hidden_size), tp_dim=0)
    return table


_NEW_MODULES = frozenset(
    {"gate_down", "gate_up", "head_norm", "output_norm", "merge", "sinks", "router"}
)


def is_new_parameter(name: str) -> bool:
    """Whether conversion adds this parameter to a Transformer's, instead of reusing one.

    Gates, the norms and weights of branches, sink tokens and routers.
    """
    return name.split(".")[-2] in _NEW_MODULES


def _block(config: ModelConfig, mixers: Mixers, ffn: FfnKind) -> Iterator[tuple[str, ParamLayout]]:
    if mixers:
        yield "mixer_norm.weight", _replicated(config.hidden_size)
    if len(mixers) == 1:
        yield from _projections(config, "mixer")
        yield from _core(config, "mixer", mixers[0], is_branch=False)
    elif mixers:
        yield from _branches(config, mixers)
    yield "ffn_norm.weight", _replicated(config.hidden_size)
    if ffn is FfnKind.dense:
        yield from _swiglu("ffn", config.hidden_size, config.intermediate_size, config.ffn_bias)
    else:
        yield from _experts(config)


def _branches(config: ModelConfig, mixers: Mixers) -> Iterator[tuple[str, ParamLayout]]:
    """`X+Y`: what both share lies in `mixer`, what is one branch's in `mixer.<its kind>`."""
    are_shared = config.branches.projections is BranchProjections.shared
    if are_shared:
        yield from _projections(config, "mixer")
    for kind in mixers:
        branch = f"mixer.{kind.name}"
        if not are_shared:
            yield from _projections(config, branch)
        yield from _core(config, branch, kind, is_branch=True)
        if config.branches.norm is BranchNorm.after_output:
            yield f"{branch}.output_norm.weight", _replicated(config.hidden_size)
    if config.branches.merge is BranchMerge.learned:
        yield "mixer.merge.weight", _merge_weights(config, len(mixers))


def _projections(config: ModelConfig, module: str) -> Iterator[tuple[str, ParamLayout]]:
    hidden, dim = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * dim, config.num_key_value_heads * dim
    for name, out in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        yield from _column(f"{module}.{name}", hidden, out, config.qkv_bias)
    yield from _row(f"{module}.o_proj", queries, hidden, config.output_bias)
    if config.qk_norm:
        yield f"{module}.q_norm.weight", _shared_by_heads(dim)
        yield f"{module}.k_norm.weight", _shared_by_heads(dim)


def _core(
    config: ModelConfig, module: str, kind: MixerKind, *, is_branch: bool
) -> Iterator[tuple[str, ParamLayout]]:
    """What a mixer has between its projections."""
    hidden, dim = config.hidden_size, config.head_dim
    is_linear = kind is MixerKind.linear
    if is_linear and config.linear.gate is GateKind.low_rank:
        rank = config.linear.gate_low_rank_dim
        yield f"{module}.gate_down.weight", _shared_by_heads(rank, hidden)
        yield from _column(f"{module}.gate_up", rank, config.num_key_value_heads * dim, True)
    if is_linear or (is_branch and config.branches.norm is BranchNorm.before_output):
        yield f"{module}.head_norm.weight", _shared_by_heads(dim)


def _merge_weights(config: ModelConfig, num_branches: int) -> ParamLayout:
    """Weights act on heads, which are cut over ranks, or on the residual stream."""
    if config.branches.norm is BranchNorm.before_output:
        return _shared_by_heads(num_branches)
    return _replicated(num_branches)


def _experts(config: ModelConfig) -> Iterator[tuple[str, ParamLayout]]:
    moe, hidden, inner = config.moe, config.hidden_size, config.expert_intermediate_size
    yield "ffn.router.weight", _replicated(moe.num_experts, hidden)
    if moe.balance in (Balance.bias, Balance.previous_step):
        name = "selection_bias" if moe.balance is Balance.bias else "previous_load"
        yield (
            f"ffn.router.{name}",
            ParamLayout((moe.num_experts,), replicated_axes=("tp",), is_state=True),
        )
    for name in ("gate_proj", "up_proj"):
        shape = (moe.num_experts, inner, hidden)
        yield f"ffn.experts.{name}.weight", ParamLayout(shape, tp_dim=1, ep_dim=0)
    shape = (moe.num_experts, hidden, inner)
    yield "ffn.experts.down_proj.weight", ParamLayout(shape, tp_dim=2, ep_dim=0)
    if moe.num_shared_experts:
        yield from _swiglu("ffn.shared", hidden, moe.num_shared_experts * inner, False)


def _swiglu(module: str, hidden: int, inner: int, bias: bool) -> Iterator[tuple[str, ParamLayout]]:
    for name in ("gate_proj", "up_proj"):
        yield from _column(f"{module}.{name}", hidden, inner, bias)
    yield from _row(f"{module}.down_proj", inner, hidden, bias)


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
