"""Spike statistics against the Gaussian oracle of the method and against plain counting."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from models.config import NeuronKind, SpikingConfig
from models.spiking.channels import Channels, TokenShare
from models.spiking.codes import SpikeCode, expand
from models.spiking.neurons import Spikes, build_neuron
from models.spiking.recorder import METRICS, NUM_BINS, SpikeRecorder


def gaussian_summary(k: float, *, tokens: int = 512, channels: int = 4096) -> dict[str, float]:
    x = torch.randn(tokens, channels, generator=torch.Generator().manual_seed(7))
    neuron = build_neuron(SpikingConfig(neuron=NeuronKind.adaptive))
    assert neuron is not None
    recorder = SpikeRecorder(tokens)
    neuron(x, Spikes(k, recorder=recorder), "0/s")
    return {name.removeprefix("0/s/"): value for name, value in recorder.summary().items()}


def gaussian_probabilities(k: float) -> list[float]:
    """Exact P(|count| = n) for unit Gaussian channels, whose mean |x| is sqrt(2 / pi)."""
    threshold = math.sqrt(2 / math.pi) / k
    cdf = NormalDist().cdf
    inner = [2 * cdf((n + 0.5) * threshold) - 1 for n in range(64)]
    return [inner[0], *(b - a for a, b in zip(inner, inner[1:], strict=False))]


def counts_of(values: list[int], channels: int = 2) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(-1, channels)


def test_gaussian_oracle_at_k_3() -> None:
    """Figures integrated from the normal distribution, to their printed digits."""
    summary = gaussian_summary(3.0)
    assert set(summary) == set(METRICS)
    assert summary["silent_share"] == pytest.approx(0.106, abs=6e-4)
    assert summary["share_le_7"] == pytest.approx(0.954, abs=6e-4)
    assert summary["mean_spikes"] == pytest.approx(1.30, abs=3e-3)
    assert summary["window_sparsity"] == pytest.approx(0.694, abs=6e-4)
    assert summary["clipped_share"] == 0.0


@pytest.mark.parametrize(
    ("k", "sparsity", "three_step_silence"),
    [(2.0, 0.719, 0.642), (2.5, 0.707, 0.601), (3.0, 0.694, 0.568), (3.5, 0.679, 0.538),
     (4.0, 0.664, 0.512)],
)  # fmt: skip
def test_gaussian_sparsity_for_each_k(k: float, sparsity: float, three_step_silence: float) -> None:
    """Integrated like those above; the last column counts 3 steps where `firing_rate` counts 9."""
    summary = gaussian_summary(k)
    assert summary["window_sparsity"] == pytest.approx(sparsity, abs=1e-3)
    assert 1 - summary["mean_spikes"] / 3 == pytest.approx(three_step_silence, abs=2e-3)
    assert summary["firing_rate"] == pytest.approx(summary["mean_spikes"] / 9, rel=1e-12)


@pytest.mark.parametrize("k", [2.0, 3.0, 4.0])
def test_gaussian_statistics_equal_the_integral(k: float) -> None:
    probabilities = gaussian_probabilities(k)
    summary = gaussian_summary(k)
    mean = sum(n * p for n, p in enumerate(probabilities))
    spikes = sum(n.bit_count() * p for n, p in enumerate(probabilities))
    assert summary["mean_count"] == pytest.approx(mean, rel=2e-3)
    assert summary["mean_spikes"] == pytest.approx(spikes, rel=2e-3)
    assert summary["silent_share"] == pytest.approx(probabilities[0], abs=1e-3)
    assert summary["share_le_7"] == pytest.approx(sum(probabilities[:8]), abs=1e-3)


def test_metrics_equal_those_of_the_expanded_spike_train() -> None:
    counts = torch.randint(-511, 512, (40, 8), generator=torch.Generator().manual_seed(3)).double()
    recorder = SpikeRecorder(1000)
    recorder.record("2/ffn_out", counts)
    summary = recorder.summary()
    train = expand(counts, SpikeCode.bitwise_bidirectional, num_steps=9)
    assert summary["2/ffn_out/firing_rate"] == pytest.approx(train.firing_rate(), rel=1e-12)
    assert summary["2/ffn_out/mean_spikes"] == pytest.approx(train.mean_spikes(), rel=1e-12)
    assert summary["2/ffn_out/window_sparsity"] == pytest.approx(train.window_sparsity(), rel=1e-12)
    assert summary["2/ffn_out/mean_count"] == pytest.approx(float(counts.abs().mean()), rel=1e-12)


def test_definitions_on_counts_worked_out_by_hand() -> None:
    recorder = SpikeRecorder(100)
    recorder.record("0/s", counts_of([0, -1, 7, 8, -64, 3, 0, 585]))
    summary = {name.removeprefix("0/s/"): value for name, value in recorder.summary().items()}
    assert summary["mean_count"] == 668 / 8
    assert summary["silent_share"] == 2 / 8
    assert summary["share_le_7"] == 5 / 8
    # Set bits 0 1 3 1 1 2 0, and nine for the count that overflows nine steps.
    assert summary["mean_spikes"] == 17 / 8
    # Windows with a spike: 0 1 1 1 1 1 0 3 of three each.
    assert summary["window_sparsity"] == pytest.approx(1 - 8 / 24, rel=1e-12)


def test_clipped_share_counts_only_what_the_clip_cut() -> None:
    recorder = SpikeRecorder(100)
    recorder.record("0/s", counts_of([7, -8, 3, 100]), max_count=7)
    assert recorder.summary()["0/s/clipped_share"] == 0.5
    assert recorder.summary()["0/s/mean_count"] == 6.0


@pytest.mark.parametrize(("tokens", "limit"), [(1, 4), (4, 4), (5, 4), (1000, 7), (4096, 256)])
def test_sample_is_even_and_never_larger_than_asked(tokens: int, limit: int) -> None:
    recorder = SpikeRecorder(limit)
    recorder.record("0/s", torch.arange(tokens).double().remainder(500)[:, None])
    histogram = recorder.tensors()["0/s"][:NUM_BINS]
    assert tokens / 2 / -(-tokens // limit) < float(histogram.sum()) <= limit
    if tokens == 5:
        assert histogram.nonzero().flatten().tolist() == [0, 2, 4]


def test_leading_dims_are_tokens_and_the_input_is_not_changed() -> None:
    counts = torch.tensor([[[-1.0, 2.0]], [[3.0, -600.0]]])
    recorder = SpikeRecorder(100)
    recorder.record("0/s", counts, max_count=100)
    assert counts.tolist() == [[[-1.0, 2.0]], [[3.0, -600.0]]]
    assert recorder.summary()["0/s/mean_count"] == 106 / 4


def test_sums_of_parts_equal_the_whole() -> None:
    counts = torch.randint(-40, 41, (30, 8), generator=torch.Generator().manual_seed(5)).double()
    whole, one_by_one = SpikeRecorder(1000), SpikeRecorder(1000)
    whole.record("0/s", counts, max_count=31)
    parts = [SpikeRecorder(1000), SpikeRecorder(1000)]
    for part, recorder in zip(counts.split([11, 19]), parts, strict=True):
        recorder.record("0/s", part, max_count=31)
        one_by_one.record("0/s", part, max_count=31)
    summed = SpikeRecorder(1)
    summed.load({"0/s": parts[0].tensors()["0/s"] + parts[1].tensors()["0/s"]})
    assert summed.summary() == whole.summary() == one_by_one.summary()
    assert summed.tensors()["0/s"].dtype == torch.float64


@pytest.mark.parametrize("num_tokens", [1, 3, 5, 7, 12, 36, 1000])
@pytest.mark.parametrize("count", [2, 3, 4, 12])
def test_shares_of_the_tokens_add_up_to_whole_rows(num_tokens: int, count: int) -> None:
    """The same tokens are sampled, whoever holds them; a rank may hold none of them."""
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.empty(3, 12, 8, dtype=torch.float64).normal_(generator=generator)
    thresholds = x.abs().mean(dim=-1, keepdim=True) / 3
    whole = SpikeRecorder(num_tokens)
    whole.record_activations("0/s", x, thresholds, max_count=4)
    assert float(whole.tensors()["0/s"][:NUM_BINS].sum()) <= num_tokens * 8
    sums = torch.zeros(NUM_BINS + 2, dtype=torch.float64)
    cut = zip(x.chunk(count, dim=1), thresholds.chunk(count, dim=1), strict=True)
    for index, (part, threshold) in enumerate(cut):
        recorder, share = SpikeRecorder(num_tokens), TokenShare(index, count)
        recorder.record_activations("0/s", part, threshold, max_count=4, share=share)
        assert list(recorder.tensors()) == ["0/s"]
        sums += recorder.tensors()["0/s"]
    assert torch.equal(sums, whole.tensors()["0/s"])


def test_a_neuron_records_the_share_that_it_is_told() -> None:
    """Or nothing, where another rank holds the same values; the encoding is the same."""
    x = torch.randn(2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    recorders = [SpikeRecorder(5) for _ in range(4)]
    config = SpikingConfig(neuron=NeuronKind.adaptive)
    whole, silent = build_neuron(config), build_neuron(config, Channels(is_counted=False))
    assert whole is not None
    assert silent is not None
    expected = whole(x, Spikes(3.0, recorder=recorders[0]), "0/s")
    assert torch.equal(silent(x, Spikes(3.0, recorder=recorders[1]), "0/s"), expected)
    assert recorders[1].tensors() == {}
    for index, part in enumerate(x.chunk(2, dim=1)):
        neuron = build_neuron(config, Channels(share=TokenShare(index, 2)))
        assert neuron is not None
        found = neuron(part, Spikes(3.0, recorder=recorders[2 + index]), "0/s")
        assert torch.equal(found, expected.chunk(2, dim=1)[index])
    sums = recorders[2].tensors()["0/s"] + recorders[3].tensors()["0/s"]
    assert torch.equal(sums, recorders[0].tensors()["0/s"])


def test_paused_ignores_and_nests() -> None:
    recorder = SpikeRecorder(4)
    with recorder.paused():
        with recorder.paused():
            recorder.record("0/s", counts_of([1, 2]))
        recorder.record("0/s", counts_of([1, 2]))
    assert recorder.summary() == {}
    recorder.record("0/s", counts_of([1, 2]))
    assert recorder.summary()["0/s/mean_count"] == 1.5
    recorder.clear()
    assert recorder.tensors() == {}


def test_refuses_an_empty_sample_and_foreign_sums() -> None:
    with pytest.raises(ValueError, match=r"num_tokens \(0\) must be at least 1"):
        SpikeRecorder(0)
    with pytest.raises(ValueError, match=r"tensors\[0/s\] \(3,\) must have shape"):
        SpikeRecorder(1).load({"0/s": torch.zeros(3)})


def test_nothing_recorded_has_no_value() -> None:
    recorder = SpikeRecorder(4)
    recorder.load({"0/s": torch.zeros(NUM_BINS + 2)})
    assert all(math.isnan(value) for value in recorder.summary().values())
