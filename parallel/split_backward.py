"""Whether this torch's split backward is right: the start-up self-test of `zero_bubble`.

A zero-bubble schedule computes gradients of a stage's input first and those of its weights later.
Earlier releases of torch counted a weight that is used twice twice, and mixed up the outputs of
operations with several (pytorch issues 180952 and 170277), both without an error.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

TOLERANCE = 1e-12


class _Probe(nn.Module):
    """A weight used twice, and a chunked input."""

    def __init__(self) -> None:
        super().__init__()
        values = torch.randn(54, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.twice = nn.Parameter(values[:36].view(6, 6).clone())
        self.left = nn.Parameter(values[36:45].view(3, 3).clone())
        self.right = nn.Parameter(values[45:].view(3, 3).clone())

    def forward(self, x: Tensor) -> Tensor:
        """Map `[n, 6]` to a scalar."""
        first, second = (torch.tanh(x @ self.twice) @ self.twice).chunk(2, dim=1)
        return (torch.tanh(first @ self.left) * (second @ self.right)).square().sum()


def find_defect() -> str | None:
    """What is wrong with the split backward here, None when it is right."""
    try:
        from torch.distributed.pipelining._backward import (
            stage_backward_input,
            stage_backward_weight,
        )
    except ImportError as error:
        return f"torch {torch.__version__} has no split backward ({error})"
    probe = _Probe()
    x = torch.linspace(-1.0, 1.0, 24, dtype=torch.float64).view(4, 6).requires_grad_()
    expected = torch.autograd.grad(probe(x), [x, *probe.parameters()])
    _, groups = stage_backward_input([probe(x)], None, [x], probe.parameters())
    stage_backward_weight(probe.parameters(), groups)
    names = ["the input", *(name for name, _ in probe.named_parameters())]
    actual = [x.grad, *(parameter.grad for parameter in probe.parameters())]
    for name, right, found in zip(names, expected, actual, strict=True):
        if found is None or float((found - right).abs().max()) > TOLERANCE * float(
            right.abs().max()
        ):
            return f"torch {torch.__version__} gives a wrong gradient of {name} in a probe"
    return None


def check_split_backward() -> None:
    """Refuse zero_bubble where its gradients would be wrong.

    Raises:
        ValueError: naming the torch release and what is wrong.
    """
    defect = find_defect()
    if defect is not None:
        raise ValueError(
            f"parallel.schedule (zero_bubble) must have a torch whose split backward is right: "
            f"{defect}. Use another schedule (one_f_one_b, interleaved) or another torch."
        )
