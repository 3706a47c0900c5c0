"""The grouped product against one row at a time, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import models.grouped_linear
from models.grouped_linear import Groups, grouped_linear
from tests.support.closeness import assert_close

COUNTS = {
    "uneven": [3, 1, 4, 5],
    "an expert without rows": [0, 7, 0, 2],
    "all rows to one": [0, 0, 11, 0],
    "no rows": [0, 0, 0, 0],
}
IN, OUT = 8, 4


def _case(counts: list[int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(counts))
    shapes = (sum(counts), IN), (len(counts), OUT, IN), (sum(counts), OUT)
    x, weight, grad = (torch.randn(s, generator=generator, dtype=dtype) for s in shapes)
    return x.requires_grad_(), weight.requires_grad_(), grad


def _one_at_a_time(x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    experts = [expert for expert, count in enumerate(counts) for _ in range(count)]
    rows = [weight[expert] @ row for expert, row in zip(experts, x, strict=True)]
    return torch.stack(rows) if rows else x.new_zeros(0, OUT) + 0 * (x.sum() + weight.sum())


def _check(
    counts: list[int],
    groups: Groups,
    *,
    dtype: torch.dtype = torch.float64,
    relative: float = 1e-14,
) -> None:
    x, weight, grad = _case(counts, dtype)
    out = grouped_linear(x, weight, groups)
    expected = _one_at_a_time(x, weight, counts)
    assert_close(out, expected, relative=relative, name="product")
    found = torch.autograd.grad(out, (x, weight), grad)
    wanted = torch.autograd.grad(expected, (x, weight), grad)
    for name, left, right in zip(("rows", "weight"), found, wanted, strict=True):
        assert_close(left, right, relative=relative, name=name)


@pytest.mark.parametrize("name", COUNTS)
def test_each_row_meets_its_experts_matrix(name: str) -> None:
    counts = COUNTS[name]
    _check(counts, Groups(torch.tensor(counts)))


def test_rows_of_equal_length_are_one_batched_product() -> None:
    """Counts are not looked at."""
    _check([3, 3, 3], Groups(torch.full((3,), -1), length=3))


@pytest.mark.parametrize("name", COUNTS)
def test_torchs_grouped_product_is_asked_rightly(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What devices with a kernel for it compute, here by torch's own loop."""
    counts = COUNTS[name]
    if sum(counts) == 0:
        assert not models.grouped_linear._takes(torch.empty(0, 8), torch.empty(2, 8, 8))
        return
    if models.grouped_linear._grouped_mm is None:
        pytest.skip("this torch has no grouped product")
    monkeypatch.setattr(models.grouped_linear, "_takes", lambda left, right: True)
    # Torch's takes no float64, and rows of whole 16 bytes.
    _check(counts, Groups(torch.tensor(counts)), dtype=torch.float32, relative=1e-5)


def test_what_torchs_grouped_product_refuses_is_found_out() -> None:
    if models.grouped_linear._grouped_mm is None:
        pytest.skip("this torch has no grouped product")
    cpu = torch.device("cpu")
    assert models.grouped_linear._computes(cpu, torch.float32)
    assert not models.grouped_linear._computes(cpu, torch.int64)


def test_wrong_products_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    right = models.grouped_linear._grouped_mm
    if right is None:
        pytest.skip("this torch has no grouped product")
    for is_wrong in (lambda right: right.dim() == 3, lambda right: right.dim() == 2):

        def product(left: Tensor, matrices: Tensor, offs: Tensor, is_wrong=is_wrong) -> Tensor:
            return right(left, matrices, offs=offs) + is_wrong(matrices)

        monkeypatch.setattr(models.grouped_linear, "_grouped_mm", product)
        cpu = torch.device("cpu")
        assert not models.grouped_linear._computes.__wrapped__(cpu, torch.float32)


@pytest.mark.parametrize(
    ("dtype", "width", "has_kernel", "reason"),
    [
        (torch.float32, 64, True, "it takes torch.bfloat16, got torch.float32"),
        (torch.bfloat16, 60, True, "it takes rows of whole 16 bytes, got 60 channels"),
        (torch.bfloat16, 64, True, "it does not compute on meta"),
        (torch.bfloat16, 64, False, f"torch {torch.__version__} has none"),
    ],
)
def test_a_loop_on_a_device_says_why_once(
    dtype: torch.dtype,
    width: int,
    has_kernel: bool,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """On any device but a CPU, where the loop is as good."""

    def product(*operands: Tensor, offs: Tensor) -> Tensor:
        raise RuntimeError("not on this device")

    models.grouped_linear._warn_once.cache_clear()
    models.grouped_linear._computes.cache_clear()
    monkeypatch.setattr(models.grouped_linear, "_grouped_mm", product if has_kernel else None)
    for device in ("cpu", "meta", "meta"):
        left = torch.empty(4, width, dtype=dtype, device=device)
        assert not models.grouped_linear._takes(left, left.new_empty(2, width, 32))
    assert caplog.messages == [
        f"torch's grouped matmul is not used for experts ({reason}): a loop over them computes "
        "instead, and waits for the device."
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("name", COUNTS)
def test_a_gpu_computes_the_same(name: str) -> None:
    """In bfloat16, whose kernel has sizes that it does not take; memory is poisoned."""
    counts = [64 * count for count in COUNTS[name]]
    for width in (64, 60):
        x = torch.randn(sum(counts), width, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn(len(counts), 96, width, device="cuda", dtype=torch.bfloat16)
        grad = torch.randn(sum(counts), 96, device="cuda", dtype=torch.bfloat16)
        expected, actual = [], []
        for results, dtype in ((expected, torch.float64), (actual, torch.bfloat16)):
            poison = torch.full_like(weight, torch.nan), torch.full_like(grad, torch.nan)
            del poison
            rows, matrices = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
            out = grouped_linear(rows, matrices, Groups(torch.tensor(counts, device="cuda")))
            results += [out, *torch.autograd.grad(out, (rows, matrices), grad.to(dtype))]
        for left, right in zip(actual, expected, strict=True):
            assert_close(left, right, relative=1e-2)


def test_the_weight_of_unused_experts_gets_zeros_not_nothing() -> None:
    x, weight, grad = _case([0, 2])
    grouped_linear(x, weight, Groups(torch.tensor([0, 2]))).backward(grad)
    assert weight.grad is not None
    assert torch.equal(weight.grad[0], torch.zeros(OUT, IN, dtype=torch.float64))


def test_frozen_operands_get_no_gradient() -> None:
    x, weight, _ = _case([2, 1])
    groups = Groups(torch.tensor([2, 1]))
    grouped_linear(x.detach(), weight, groups).sum().backward()
    grouped_linear(x, weight.detach(), groups).sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
