from __future__ import annotations

import pytest
import torch

from models.norm import RMSNorm
from tests.support.closeness import assert_close


def _norm(dim: int, dtype: torch.dtype) -> RMSNorm:
    norm = RMSNorm(dim, 1e-6).to(dtype)
    torch.nn.init.normal_(norm.weight, 1.0, 0.3)
    return norm


def _by_formula(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt((x**2).mean(dim=-1, keepdim=True) + 1e-6) * weight


def test_forward_and_backward_are_the_formula() -> None:
    norm = _norm(7, torch.float64)
    x = torch.randn(3, 5, 7, dtype=torch.float64, requires_grad=True)
    out, expected = norm(x), _by_formula(x, norm.weight)
    assert_close(out, expected, relative=1e-14)
    inputs = [x, norm.weight]
    probe = torch.randn_like(out)
    actual = torch.autograd.grad(out, inputs, probe)
    wanted = torch.autograd.grad(expected, inputs, probe)
    for got, want in zip(actual, wanted, strict=True):
        assert_close(got, want, relative=1e-13)


def test_a_zero_row_has_a_finite_gradient() -> None:
    norm = _norm(4, torch.float64)
    x = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad is not None
    assert_close(x.grad, norm.weight[None] * 1e3, relative=1e-12)


def test_bf16_activations_with_float32_weights_keep_the_activation_dtype() -> None:
    norm = _norm(64, torch.float32)
    x = torch.randn(4, 64).bfloat16().requires_grad_()
    out = norm(x)
    assert out.dtype == torch.bfloat16
    # Only the final rounding may be bf16's: the formula in float64, rounded once.
    exact = _by_formula(x.double(), norm.weight.double()).to(torch.bfloat16)
    assert_close(out, exact, relative=2e-3)
    assert (out != exact).float().mean() < 0.02
    out.float().sum().backward()
    assert norm.weight.grad is not None
    assert norm.weight.grad.dtype == torch.float32


def test_a_weight_nobody_filled_is_nan() -> None:
    assert RMSNorm(3, 1e-6)(torch.ones(1, 3)).isnan().all()


def test_a_second_derivative_is_refused_not_wrong() -> None:
    norm, x = _norm(4, torch.float64), torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
