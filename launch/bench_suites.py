"""The rows of `launch.bench`: what is timed, beside which baseline, against which goal."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import ModelConfig, NeuronKind, RopeConfig, SpikingConfig
from models.generation import DecodeState, decode_step, prefill
from models.initialisation import initialise
from models.kernels.kernel_set import KernelSet
from models.model import Model
from models.sequence import SequenceContext
from models.spiking.neurons import Spikes
from models.spiking.recorder import SpikeRecorder

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, WINDOW = 8, 2, 64, 512


@dataclass(frozen=True, slots=True)
class Setting:
    """Where and how often to measure; `long_repeats` is for rows of minutes."""

    device: torch.device
    kernels: KernelSet
    repeats: int
    long_repeats: int


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison; `goal` is the largest good ratio, None where there is none."""

    name: str
    ours: float
    baseline: float
    ratio: float
    unit: str
    goal: float | None

    @property
    def met(self) -> bool | None:
        """Whether the ratio is within the goal; None without a goal."""
        return None if self.goal is None else self.ratio <= self.goal

    def line(self) -> str:
        """One log line."""
        goal = (
            ""
            if self.goal is None
            else f"  goal <= {self.goal:g}: {'met' if self.met else 'MISSED'}"
        )
        return (
            f"{self.name:<44} {self.ours:12.4g} {self.baseline:12.4g} {self.unit:<7} "
            f"ratio {self.ratio:7.3f}{goal}"
        )

    def markdown(self) -> str:
        """One table row."""
        goal = "" if self.goal is None else f"{self.goal:g}"
        met = {True: "yes", False: "no", None: ""}[self.met]
        return (
            f"| {self.name} | {self.ours:.4g} {self.unit} | {self.baseline:.4g} {self.unit} | "
            f"{self.ratio:.3f} | {goal} | {met} |"
        )


Work = Callable[[], object]


def seconds(work: Work, device: torch.device) -> float:
    """Wall time of one call, the device's queue included."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    start = time.perf_counter()
    work()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def paired(
    ours: Work, baseline: Work, setting: Setting, *, repeats: int
) -> tuple[float, float, float]:
    """Medians of both in seconds and the median ratio of pairs run in turn, after one warm-up."""
    ours()
    baseline()
    pairs = [
        (seconds(ours, setting.device), seconds(baseline, setting.device)) for _ in range(repeats)
    ]
    return (
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(a / b for a, b in pairs),
    )


def kernels(setting: Setting) -> Iterator[Row]:
    """Forward and backward of the mixers against causal SDPA, and how they grow with length."""
    times: dict[tuple[str, int], float] = {}
    for length in (4096, 16384):
        work = {name: _mixer_work(name, length, setting) for name in ("linear", "window", "sdpa")}
        for name in ("linear", "window"):
            ours, base, ratio = paired(work[name], work["sdpa"], setting, repeats=setting.repeats)
            times[name, length] = ours
            times["sdpa", length] = base
            goal = 1.0 if length == 4096 else None
            label = {"linear": "chunked linear", "window": f"window {WINDOW}"}[name]
            yield Row(
                f"{label} vs causal SDPA, fwd+bwd, {length}",
                1e3 * ours,
                1e3 * base,
                ratio,
                "ms",
                goal,
            )
        del work
        gc.collect()
    for name in ("linear", "window"):
        growth = times[name, 16384] / times[name, 4096]
        sdpa = times["sdpa", 16384] / times["sdpa", 4096]
        yield Row(f"{name}: time at 16384 over 4096 (SDPA beside)", growth, sdpa, growth, "x", 4.6)


def _mixer_work(name: str, length: int, setting: Setting) -> Work:
    generator = torch.Generator().manual_seed(1)

    def draw(heads: int) -> Tensor:
        values = torch.randn(1, length, heads, HEAD_DIM, generator=generator)
        return values.to(setting.device).requires_grad_()

    q, k, v, gate = draw(NUM_HEADS), draw(NUM_KV_HEADS), draw(NUM_KV_HEADS), draw(NUM_KV_HEADS)
    grad = torch.randn(1, length, NUM_HEADS, HEAD_DIM, generator=generator).to(setting.device)
    scale = HEAD_DIM**-0.5

    def linear() -> Tensor:
        out, _ = setting.kernels.linear_attention(
            F.relu(q), F.relu(k), v, F.logsigmoid(gate) / 16, scale=scale, sequence=None
        )
        return out

    def window() -> Tensor:
        return setting.kernels.softmax_attention(q, k, v, scale=scale, window=WINDOW, sequence=None)

    def sdpa() -> Tensor:
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        )
        return out.transpose(1, 2)

    forward = {"linear": linear, "window": window, "sdpa": sdpa}[name]
    return lambda: torch.autograd.backward(forward(), grad)


def bench_model(mixers: str = "[L S]*4") -> ModelConfig:
    """The model of the step, prefill and decode rows."""
    return ModelConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1408, num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KV_HEADS, head_dim=HEAD_DIM, mixers=mixers, ffns="d*8",
        qkv_bias=True, window_tokens=WINDOW, rope=RopeConfig(theta=10_000.0),
    )  # fmt: skip


def build(setting: Setting, *, mixers: str = "[L S]*4", spiking: bool = False) -> Model:
    """The bench model with seeded weights."""
    neuron = NeuronKind.adaptive if spiking else NeuronKind.off
    model = Model(
        bench_model(mixers), spiking=SpikingConfig(neuron=neuron), kernels=setting.kernels
    )
    initialise(model, seed=1)
    return model.to(setting.device)


def hugging_face(attention: str, device: torch.device) -> nn.Module:
    """Hugging Face's Qwen2 of the same sizes, every layer full attention."""
    import transformers

    config = transformers.Qwen2Config(
        vocab_size=4096, hidden_size=512, intermediate_size=1408, num_hidden_layers=8,
        num_attention_heads=NUM_HEADS, num_key_value_heads=NUM_KV_HEADS,
        max_position_embeddings=65_536, tie_word_embeddings=False, use_cache=True,
        attn_implementation=attention,
    )  # fmt: skip
    torch.manual_seed(1)
    model: nn.Module = transformers.Qwen2ForCausalLM(config)
    return model.to(device)


def our_step(model: Model, length: int, device: torch.device, spikes: Spikes | None = None) -> Work:
    """One optimizer step on one row."""
    tokens = torch.randint(0, 4096, (1, length), generator=torch.Generator().manual_seed(2)).to(
        device
    )
    labels = tokens.roll(-1, dims=1)
    sequence = SequenceContext.one_document_per_row(1, length, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def work() -> None:
        loss = model(tokens, sequence, labels=labels, spikes=spikes) / length
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return work


def hugging_face_step(model: nn.Module, length: int, device: torch.device) -> Work:
    """The same step of the Hugging Face model."""
    tokens = torch.randint(0, 4096, (1, length), generator=torch.Generator().manual_seed(2)).to(
        device
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def work() -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return work


def step(setting: Setting) -> Iterator[Row]:
    """A training step of the hybrid against the Hugging Face Qwen2 of the same sizes."""
    cases = [("sdpa", 4096, 1.0, setting.repeats), ("eager", 4096, 1.0, setting.repeats),
             ("sdpa", 16384, 0.5, setting.long_repeats)]  # fmt: skip
    for attention, length, goal, repeats in cases:
        ours = our_step(build(setting), length, setting.device)
        theirs = hugging_face_step(hugging_face(attention, setting.device), length, setting.device)
        a, b, ratio = paired(ours, theirs, setting, repeats=repeats)
        del ours, theirs
        gc.collect()
        yield Row(f"training step vs HF Qwen2 {attention}, {length}", a, b, ratio, "s", goal)


def spiking(setting: Setting) -> Iterator[Row]:
    """What spiking and its statistics add to a training step."""
    length = 4096
    model = build(setting, spiking=True)
    off = our_step(model, length, setting.device)
    on = our_step(model, length, setting.device, Spikes(k=3.0))
    a, b, ratio = paired(on, off, setting, repeats=setting.repeats)
    yield Row(f"step with spiking vs without, {length}", a, b, ratio, "s", 1.10)
    recorded = our_step(model, length, setting.device, Spikes(k=3.0, recorder=SpikeRecorder(256)))
    a, b, ratio = paired(recorded, on, setting, repeats=setting.repeats)
    yield Row(
        f"spiking step with statistics (256 tokens) vs without, {length}", a, b, ratio, "s", 1.02
    )


@torch.no_grad()
def _prefill_rows(setting: Setting, length: int) -> Iterator[Row]:
    tokens = torch.randint(0, 4096, (1, length), generator=torch.Generator().manual_seed(3))
    tokens = tokens.to(setting.device)
    model, theirs = build(setting).eval(), hugging_face("sdpa", setting.device).eval()
    a, b, ratio = paired(
        lambda: prefill(model, tokens, chunk_tokens=4096),
        lambda: theirs(input_ids=tokens, use_cache=True, logits_to_keep=1),
        setting,
        repeats=setting.long_repeats,
    )
    yield Row(f"prefill of {length} tokens vs HF Qwen2 sdpa", a, b, ratio, "s", 1.0)


def prefill_suite(setting: Setting) -> Iterator[Row]:
    """Time to the first token after a long prompt."""
    yield from _prefill_rows(setting, 32_768)


@torch.no_grad()
def decode(setting: Setting) -> Iterator[Row]:
    """Memory of the decode state and time of a step after 1k and after 32k tokens."""
    model = build(setting).eval()
    tokens = torch.randint(0, 4096, (1, 32_768), generator=torch.Generator().manual_seed(4))
    tokens = tokens.to(setting.device)
    states = {n: prefill(model, tokens[:, :n], chunk_tokens=4096)[1] for n in (1024, 32_768)}
    sizes = {n: state_bytes(state) for n, state in states.items()}
    ratio = sizes[32_768] / sizes[1024]
    yield Row(
        "decode state after 32768 tokens vs 1024", sizes[32_768], sizes[1024], ratio, "bytes", 1.0
    )

    def steps(length: int) -> Work:
        def work() -> None:
            state = states[length]
            for _ in range(16):
                _, state = decode_step(model, tokens[:, 0], state)
            states[length] = state

        return work

    a, b, ratio = paired(steps(32_768), steps(1024), setting, repeats=setting.repeats)
    yield Row("16 decode steps after 32768 tokens vs 1024", a, b, ratio, "s", None)


def state_bytes(state: DecodeState) -> float:
    """Bytes of all tensors of a decode state."""
    return float(state.num_bytes)


SUITES: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "kernels": kernels,
    "step": step,
    "spiking": spiking,
    "prefill": prefill_suite,
    "decode": decode,
}
