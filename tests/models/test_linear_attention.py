from __future__ import annotations

import torch
import torch.nn.functional as F

from models.linear_attention import GatedLinearAttention
from models.mixer import Mixer
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
