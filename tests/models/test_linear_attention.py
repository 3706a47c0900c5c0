from __future__ import annotations

import itertools
from decimal import Decimal, localcontext

import pytest
import torch
import torch.nn.functional as F

from models.linear_attention import GatedLinearAttention, key_tied_gate
from models.mixer import Mixer
from models.mixer_config import FeatureMap, GateKind, LinearAttentionConfig
from models.reference import linear_attention
from models.sequence import SequenceContext
from tests.models.tiny import packed, tiny_config, tiny_model
from tests.support.closeness import assert_close


def _mixer(**changes: object) -> Mixer:
    config = tiny_config(mixers="L", ffns="d", **changes)
    mixer = tiny_model(config).blocks[0].mixer
    assert mixer is not None
    assert isinstance(mixer.branches[0].core, GatedLinearAttention)
    return mixer


def _log_decay(mixer: Mixer, x: torch.Tensor) -> torch.Tensor:
    (branch,) = mixer.branches
    return branch.core.log_decay(branch.projections.project(x), x)


def _x(tokens: int, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, tokens, 24, generator=torch.Generator().manual_seed(1)).double()


def _by_the_report(mixer: Mixer, x: torch.Tensor) -> torch.Tensor:
    """One row `[T, D]`, head by head and step by step, from the weights alone."""
    w = {name: parameter.detach() for name, parameter in mixer.named_parameters()}
    heads, dim, group = 4, 8, 2
    q = F.relu(x @ w["q_proj.weight"].T + w["q_proj.bias"])
    k = F.relu(x @ w["k_proj.weight"].T + w["k_proj.bias"])
    v = x @ w["v_proj.weight"].T + w["v_proj.bias"]
    z = x @ w["gate_down.weight"].T @ w["gate_up.weight"].T + w["gate_up.bias"]
    decay = torch.sigmoid(z) ** (1 / 16)
    out = torch.zeros(len(x), heads * dim, dtype=x.dtype)
    for head in range(heads):
        mine = slice(head * dim, (head + 1) * dim)
        shared = slice(head // group * dim, (head // group + 1) * dim)
        state = torch.zeros(dim, dim, dtype=x.dtype)
        for step in range(len(x)):
            state = decay[step, shared, None] * state + torch.outer(
                k[step, shared], v[step, shared]
            )
            o = dim**-0.5 * q[step, mine] @ state
            out[step, mine] = o / (o.square().mean() + 1e-6).sqrt() * w["head_norm.weight"]
    return out @ w["o_proj.weight"].T


def test_the_mixer_is_the_formula_of_the_report() -> None:
    mixer, x = _mixer(), _x(11)
    out = mixer(x, SequenceContext.one_document_per_row(2, 11))
    for row in range(2):
        assert_close(out[row], _by_the_report(mixer, x[row]), relative=1e-12)


def test_there_is_no_position_but_through_decays() -> None:
    mixer, x = _mixer(), _x(6, rows=1)
    with torch.no_grad():
        mixer.gate_up.bias.fill_(60.0)  # every decay is 1 to 1e-26
    sequence = SequenceContext.one_document_per_row(1, 6)
    order = torch.tensor([3, 0, 4, 2, 1, 5])
    shuffled = mixer(x[:, order], sequence)
    assert_close(shuffled[:, -1], mixer(x, sequence)[:, -1], relative=1e-12)


def test_packed_documents_mix_as_if_alone_forward_and_backward() -> None:
    mixer, lengths = _mixer(), [[4, 9], [1, 12]]
    x = _x(13).requires_grad_()
    together = mixer(x, packed(lengths))
    probe = torch.randn_like(together)
    (actual,) = torch.autograd.grad(together, x, probe)
    for row, documents in enumerate(lengths):
        start = 0
        for length in documents:
            where = (slice(row, row + 1), slice(start, start + length))
            alone = mixer(x[where], SequenceContext.one_document_per_row(1, length))
            assert_close(together[where], alone, relative=1e-12)
            (wanted,) = torch.autograd.grad(alone, x, probe[where])
            assert_close(actual[where], wanted[where], relative=1e-12)
            start += length


def test_extending_is_the_full_forward_with_a_state_of_constant_size() -> None:
    mixer, x = _mixer(qk_norm=True), _x(12)
    expected = mixer(x, SequenceContext.one_document_per_row(2, 12))
    state, start, parts = None, 0, []
    for count in (1, 4, 1, 6):
        out, state = mixer.extend(x[:, start : start + count], state)
        # One state a key-value head, not one a query head.
        assert state.shape == (2, 2, 8, 8)
        parts.append(out)
        start += count
    assert_close(torch.cat(parts, dim=1), expected, relative=1e-12)


def test_query_and_key_norms_act_before_the_feature_map() -> None:
    mixer, x = _mixer(qk_norm=True), _x(3)
    q, k, _ = mixer.branches[0].projections.project(x)
    raw = mixer.q_proj(x).view(2, 3, 4, 8)
    assert mixer.q_norm is not None
    assert mixer.k_norm is not None
    assert_close(q, mixer.q_norm(raw))
    assert_close(k, mixer.k_norm(mixer.k_proj(x).view(2, 3, 2, 8)))
    assert (q < 0).any()


def test_bf16_decays_and_state_stay_float32() -> None:
    mixer = _mixer().bfloat16()
    x = _x(4).bfloat16()
    assert _log_decay(mixer, x).dtype == torch.float32
    out, state = mixer.extend(x, None)
    assert out.dtype == torch.bfloat16
    assert state.dtype == torch.float32


def test_gate_and_norm_parameters_may_stay_float32_under_bf16() -> None:
    mixer = _mixer().bfloat16()
    for module in (mixer.gate_down, mixer.gate_up, mixer.head_norm):
        module.float()
    x = _x(4).bfloat16().requires_grad_()
    out = mixer(x, SequenceContext.one_document_per_row(2, 4))
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == parameter.dtype
        assert parameter.grad.isfinite().all(), name


OFFSETS_AND_FLOORS = [(0.0, 0.0), (3.0, 0.0), (0.0, 0.05), (-1.5, 0.5)]


def key_tied(offset: float = 0.0, floor: float = 0.0) -> LinearAttentionConfig:
    return LinearAttentionConfig(
        feature_map=FeatureMap.sigmoid, gate=GateKind.key_tied, gate_offset=offset, gate_floor=floor
    )


def _tied_by_the_report(
    weights: dict[str, torch.Tensor], x: torch.Tensor, offset: float, floor: float
) -> torch.Tensor:
    """One row `[T, D]` step by step, g = 1 - k as it is written."""
    heads, dim, group = 4, 8, 2
    q = torch.sigmoid(x @ weights["q_proj.weight"].T + weights["q_proj.bias"])
    u = x @ weights["k_proj.weight"].T + weights["k_proj.bias"] - offset
    k = (1 - floor) * torch.sigmoid(u)
    v = x @ weights["v_proj.weight"].T + weights["v_proj.bias"]
    outputs = []
    states = [torch.zeros(dim, dim, dtype=x.dtype) for _ in range(heads)]
    for step in range(len(x)):
        for head in range(heads):
            mine = slice(head * dim, (head + 1) * dim)
            shared = slice(head // group * dim, (head // group + 1) * dim)
            key, value = k[step, shared], v[step, shared]
            states[head] = (1 - key)[:, None] * states[head] + torch.outer(key, value)
            o = dim**-0.5 * q[step, mine] @ states[head]
            outputs.append(o / (o.square().mean() + 1e-6).sqrt() * weights["head_norm.weight"])
    return torch.cat(outputs).view(len(x), heads * dim) @ weights["o_proj.weight"].T


@pytest.mark.parametrize(("offset", "floor"), OFFSETS_AND_FLOORS)
def test_a_key_tied_gate_is_the_formula_forward_and_backward(offset: float, floor: float) -> None:
    mixer, x = _mixer(linear=key_tied(offset, floor)), _x(11).requires_grad_()
    weights = dict(mixer.named_parameters())
    assert not any("gate" in name for name in weights)
    out = mixer(x, SequenceContext.one_document_per_row(2, 11))
    expected = torch.stack([_tied_by_the_report(weights, row, offset, floor) for row in x])
    assert_close(out, expected, relative=1e-12)
    probe, leaves = torch.randn_like(out), (x, *weights.values())
    actual = torch.autograd.grad(out, leaves, probe)
    wanted = torch.autograd.grad(expected, leaves, probe)
    for name, gradient, twin in zip(("x", *weights), actual, wanted, strict=True):
        assert_close(gradient, twin, relative=1e-11, name=name)


def test_extending_with_a_key_tied_gate_is_the_full_forward() -> None:
    mixer, x = _mixer(linear=key_tied(1.0, 0.1), qk_norm=True), _x(12)
    expected = mixer(x, SequenceContext.one_document_per_row(2, 12))
    state, start, parts = None, 0, []
    for count in (1, 4, 1, 6):
        out, state = mixer.extend(x[:, start : start + count], state)
        parts.append(out)
        start += count
    assert_close(torch.cat(parts, dim=1), expected, relative=1e-12)


def _exact_gate(u: float, offset: float, floor: float) -> list[float]:
    """Key and log decay of one channel and their derivatives in u, in 1000 digits."""
    with localcontext() as context:
        context.prec = 1000
        share = 1 / (1 + (Decimal(offset) - Decimal(u)).exp())
        key = (1 - Decimal(floor)) * share
        slope = key * (1 - share)
        return [float(each) for each in (key, (1 - key).ln(), slope, -slope / (1 - key))]


@pytest.mark.parametrize(("offset", "floor"), OFFSETS_AND_FLOORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_keys_and_decays_are_exact_at_any_size(
    dtype: torch.dtype, offset: float, floor: float
) -> None:
    """Where 1 - k has no digits left, where k is next to nothing, and between."""
    sizes = (0.0, 0.5, 4.0, 18.0, 40.0, 80.0)
    u = torch.tensor(
        [sign * size for size, sign in itertools.product(sizes, (1, -1))], dtype=dtype
    ).requires_grad_()
    key, log_decay = key_tied_gate(u, offset=offset, floor=floor)
    (key_slope,) = torch.autograd.grad(key.sum(), u, retain_graph=True)
    (decay_slope,) = torch.autograd.grad(log_decay.sum(), u)
    digits = 8 * torch.finfo(dtype).eps
    # With a floor the logarithm of the decay has the digits of 1, as has the slope of a key.
    near_one = {"dk": digits} | dict.fromkeys(("log g", "dlog g"), digits if floor else 0.0)
    found = (key.detach(), log_decay.detach(), key_slope, decay_slope)
    for index, value in enumerate(u.detach().tolist()):
        wanted = _exact_gate(value, offset, floor)
        for name, tensor, number in zip(("k", "log g", "dk", "dlog g"), found, wanted, strict=True):
            assert_close(
                float(tensor[index]), number, relative=digits, absolute=near_one.get(name, 0.0),
                name=f"{name}({value})",
            )  # fmt: skip


def test_a_decay_does_not_come_from_a_rounded_key() -> None:
    """bfloat16: the key is 1 from 6 on, and a gate of 1 - k would forget everything."""
    key, log_decay = key_tied_gate(torch.tensor([6.5, 9.0]).bfloat16(), offset=0.0, floor=0.0)
    assert key.dtype == torch.bfloat16
    assert (key == 1).all()
    assert log_decay.dtype == torch.float32
    assert_close(log_decay, [-6.50150227, -9.00012340], relative=1e-6)


def test_strong_decays_in_float32_are_near_float64() -> None:
    """Logits of spread 20: a sum of log decays of hundreds within a chunk."""
    mixer, x = _mixer(linear=key_tied()), _x(150)
    with torch.no_grad():
        mixer.k_proj.weight.mul_(20 / float(mixer.k_proj(x).std()))
    sequence = SequenceContext.one_document_per_row(2, 150)
    assert (_log_decay(mixer, x).sum(dim=1) < -1000).any()
    found = []
    for dtype in (torch.float64, torch.float32):
        leaf = x.to(dtype).requires_grad_()
        (heads,) = mixer.to(dtype).attend(leaf, sequence)
        (gradient,) = torch.autograd.grad(heads.square().sum(), leaf)
        found.append((heads, gradient))
    (expected, wanted), (heads, gradient) = found
    assert_close(heads, expected, relative=1e-5)
    assert_close(gradient, wanted, relative=1e-5)


def test_a_floor_is_the_smallest_decay() -> None:
    _, log_decay = key_tied_gate(torch.tensor([-50.0, 0.0, 50.0]), offset=0.0, floor=0.2)
    assert_close(log_decay.exp(), [1.0, 0.6, 0.2], relative=1e-6)


def test_the_sigmoid_feature_map_works_with_a_gate_of_its_own() -> None:
    linear = LinearAttentionConfig(feature_map=FeatureMap.sigmoid)
    mixer, x = _mixer(linear=linear), _x(9)
    (heads,) = mixer.attend(x, SequenceContext.one_document_per_row(2, 9))
    q, k, v = mixer.branches[0].projections.project(x)
    decay = _log_decay(mixer, x)
    expected, _ = linear_attention(q.sigmoid(), k.sigmoid(), v, decay, scale=8**-0.5, sequence=None)
    assert_close(heads, expected, relative=1e-12)
