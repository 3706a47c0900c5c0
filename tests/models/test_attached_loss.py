from __future__ import annotations

import torch

from models.attached_loss import answer, attach


def test_an_attached_loss_has_its_own_gradient() -> None:
    x, y = (torch.tensor([2.0, 3.0], requires_grad=True) for _ in range(2))
    out = attach(x, y.square().sum(), 0.5)
    assert torch.equal(out, x)
    (out * torch.tensor([5.0, 7.0])).sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    assert x.grad.tolist() == [5.0, 7.0]
    assert y.grad.tolist() == [2.0, 3.0]


def test_an_answer_gives_zeros_to_what_has_no_other_gradient() -> None:
    x = torch.tensor(2.0, requires_grad=True)
    unused, used = (torch.ones(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    out = answer(x * 1.0, unused, used) + used.sum()
    assert float(out) == 8.0
    out.backward()
    assert float(x.grad) == 1.0  # type: ignore[arg-type]
    assert unused.grad is not None
    assert used.grad is not None
    assert unused.grad.dtype is torch.float64
    assert torch.equal(unused.grad, torch.zeros(2, 3, dtype=torch.float64))
    assert torch.equal(used.grad, torch.ones(2, 3, dtype=torch.float64))
    assert answer(x) is x
