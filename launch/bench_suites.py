"""Rows of `launch.bench` against what a user would otherwise run: SDPA, Hugging Face, no spikes."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from launch.bench_models import (
    build,
    hugging_face,
    hugging_face_step,
    our_step,
    random_tokens,
    row_flops,
)
from launch.bench_rows import Row, Setting, Work, compare
from models.generation import decode_step, prefill
from models.recomputation import NOTHING, Recomputation
from models.spiking.neurons import Spikes
from models.spiking.recorder import SpikeRecorder

DECODE_TOKENS = (1024, 32_768)
TOKENS_KEPT_AT_LENGTH = 1 / 0.9
"""On accelerators a token of a long row may cost this much more: 90 % of the tokens a second."""
LINEAR_GROWTH = 1.15
"""Time may grow this much faster than length: 4.6 x for 4 x the tokens."""


def kernels(setting: Setting) -> Iterator[Row]:
    """Forward and backward of the mixers against causal SDPA, and how they grow with length."""
    lengths = (setting.short_tokens, setting.long_tokens)
    labels = {"linear": "chunked linear", "window": f"window {setting.model.visible_window_tokens}"}
    times: dict[tuple[str, int], float] = {}
    for length in lengths:
        work = {name: mixer_work(name, length, setting) for name in ("linear", "window", "sdpa")}
        for name, label in labels.items():
            row = compare(
                f"{label} vs causal SDPA, fwd+bwd, {length}",
                work[name],
                work["sdpa"],
                setting,
                goal=1.0 if length == lengths[0] else None,
                unit="ms",
            )
            times[name, length] = row.ours
            times["sdpa", length] = row.baseline or 0.0
            yield row
        yield compare(
            f"linear, a state a KV head vs a query head, {length}",
            work["linear"],
            mixer_work("linear", length, setting, num_states=setting.model.num_attention_heads),
            setting,
            unit="ms",
        )
        del work
        gc.collect()
    growth = {name: times[name, lengths[1]] / times[name, lengths[0]] for name in (*labels, "sdpa")}
    for name in labels:
        yield Row(
            f"{name}: time at {lengths[1]} over {lengths[0]} (SDPA beside)",
            growth[name],
            growth["sdpa"],
            growth[name],
            "x",
            LINEAR_GROWTH * lengths[1] / lengths[0],
        )


def mixer_work(name: str, length: int, setting: Setting, *, num_states: int | None = None) -> Work:
    """Forward and backward of one kernel on random `[1, length, heads, head_dim]` inputs.

    `num_states` are the heads of keys, values and gates: the model's KV heads by default.
    """
    config = setting.model
    groups = num_states or config.num_key_value_heads
    generator = torch.Generator().manual_seed(1)

    def draw(heads: int) -> Tensor:
        values = torch.randn(1, length, heads, config.head_dim, generator=generator)
        return values.to(setting.device, setting.dtype)

    q, k, v = (
        draw(heads).requires_grad_() for heads in (config.num_attention_heads, groups, groups)
    )
    gate = draw(groups).float().requires_grad_()
    grad = draw(config.num_attention_heads)
    scale = config.head_dim**-0.5
    ours = setting.backend.kernels()

    def linear() -> Tensor:
        out, _ = ours.linear_attention(
            F.relu(q), F.relu(k), v, F.logsigmoid(gate) / 16, scale=scale, sequence=None
        )
        return out

    def window() -> Tensor:
        visible = config.visible_window_tokens
        return ours.softmax_attention(q, k, v, scale=scale, window=visible, sequence=None)

    def sdpa() -> Tensor:
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        )
        return out.transpose(1, 2)

    forward = {"linear": linear, "window": window, "sdpa": sdpa}[name]
    return lambda: torch.autograd.backward(forward(), grad)


def step(setting: Setting) -> Iterator[Row]:
    """A training step against the Hugging Face Qwen2 of the same sizes, short and long."""
    short, long = setting.short_tokens, setting.long_tokens
    cases = [("sdpa", short, 1.0), ("eager", short, 1.0), ("sdpa", long, 0.5)]
    rows: dict[tuple[str, int], Row] = {}
    for attention, length, goal in cases:
        ours = our_step(build(setting), length, setting)
        theirs = hugging_face_step(hugging_face(setting, attention), length, setting)
        repeats = setting.repeats if length == short else setting.long_repeats
        name = f"training step vs HF Qwen2 {attention}, {length}"
        rows[attention, length] = compare(name, ours, theirs, setting, goal=goal, repeats=repeats)
        del ours, theirs
        gc.collect()
        yield rows[attention, length]
    for length in (short, long):
        yield _utilisation(rows["sdpa", length].ours, length, setting)
    at_short, at_long = rows["sdpa", short], rows["sdpa", long]
    per_token = (at_long.ours / long) / (at_short.ours / short)
    theirs_per_token = ((at_long.baseline or 0) / long) / ((at_short.baseline or 1) / short)
    yield Row(
        f"step: time a token at {long} over {short} (HF beside)",
        per_token,
        theirs_per_token,
        per_token,
        "x",
        None if setting.device.type == "cpu" else TOKENS_KEPT_AT_LENGTH,
    )


def _utilisation(step_seconds: float, length: int, setting: Setting) -> Row:
    """Model FLOP/s of a step beside the device's peak: the ratio is the run's `mfu`."""
    rate = row_flops(setting.model, length) / step_seconds
    peak = setting.backend.peak_flops(setting.dtype)
    tera = None if peak is None else peak / 1e12
    name = f"training step: model FLOP/s of peak, {length}"
    return Row(name, rate / 1e12, tera, None if peak is None else rate / peak, "TFLOP/s")


def spiking(setting: Setting) -> Iterator[Row]:
    """What spiking and its statistics add to a training step."""
    length = setting.short_tokens
    model = build(setting)
    off = our_step(model, length, setting)
    on = our_step(model, length, setting, Spikes(k=3.0))
    yield compare(f"step with spiking vs without, {length}", on, off, setting, goal=1.10)
    recorded = our_step(model, length, setting, Spikes(k=3.0, recorder=SpikeRecorder(256)))
    name = f"spiking step with statistics (256 tokens) vs without, {length}"
    yield compare(name, recorded, on, setting, goal=1.02)


def recompute(setting: Setting) -> Iterator[Row]:
    """What computing activations again costs, by kind."""
    length = setting.short_tokens
    mixers = setting.model.layers.mixers
    layers = frozenset(range(len(mixers)))
    kinds = {
        "every block": Recomputation(blocks=layers),
        "norms and activations": Recomputation(norms=layers, activations=layers),
        "mixers": Recomputation(mixers=frozenset(layer for layer in layers if mixers[layer])),
    }
    kept = our_step(build(setting, recompute=NOTHING), length, setting)
    for name, kind in kinds.items():
        again = our_step(build(setting, recompute=kind), length, setting)
        yield compare(f"step with recompute of {name} vs none, {length}", again, kept, setting)


@torch.no_grad()
def prefill_suite(setting: Setting) -> Iterator[Row]:
    """Time to the first token after a long prompt."""
    length = setting.prefill_tokens
    tokens = random_tokens(setting, length)
    model, theirs = build(setting).eval(), hugging_face(setting, "sdpa").eval()
    yield compare(
        f"prefill of {length} tokens vs HF Qwen2 sdpa",
        lambda: prefill(model, tokens, chunk_tokens=4096),
        lambda: theirs(input_ids=tokens, use_cache=True, logits_to_keep=1),
        setting,
        goal=1.0,
        repeats=setting.long_repeats,
    )


@torch.no_grad()
def decode(setting: Setting) -> Iterator[Row]:
    """Memory of the decode state and time of a step after a short and after a long prompt."""
    model = build(setting).eval()
    short, long = DECODE_TOKENS
    tokens = random_tokens(setting, long)
    states = {n: prefill(model, tokens[:, :n], chunk_tokens=4096)[1] for n in DECODE_TOKENS}
    sizes = {n: float(state.num_bytes) for n, state in states.items()}
    name = f"decode state after {long} tokens vs {short}"
    yield Row(name, sizes[long], sizes[short], sizes[long] / sizes[short], "bytes", 1.0)

    def steps(length: int) -> Work:
        def work() -> None:
            state = states[length]
            for _ in range(16):
                _, state = decode_step(model, tokens[:, 0], state)
            states[length] = state

        return work

    yield compare(
        f"16 decode steps after {long} tokens vs {short}", steps(long), steps(short), setting
    )
