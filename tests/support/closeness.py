"""One comparison for all tests: largest difference against the largest expected value."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Values = Tensor | float | Sequence[float]


def relative_error(actual: Values, expected: Values) -> float:
    """`max |actual - expected| / max |expected|` in float64; NaN anywhere is infinite."""
    left, right = _double(actual), _double(expected)
    if left.shape != right.shape:
        raise AssertionError(f"shape {tuple(left.shape)} must equal {tuple(right.shape)}")
    if right.numel() == 0:
        return 0.0
    difference = float((left - right).abs().max())
    size = float(right.abs().max())
    if math.isnan(difference) or math.isnan(size):
        return math.inf
    if difference == 0.0:
        return 0.0
    return difference / size if size > 0 else math.inf


def assert_close(
    actual: Values,
    expected: Values,
    *,
    relative: float = 0.0,
    absolute: float = 0.0,
    name: str = "value",
) -> None:
    """Fail unless `max |actual - expected| <= absolute + relative * max |expected|`.

    Works in float64, refuses other shapes and any NaN, and says by how much it failed. With neither
    tolerance the two must be equal.
    """
    left, right = _double(actual), _double(expected)
    assert left.shape == right.shape, (
        f"{name}: shape {tuple(left.shape)} must equal {tuple(right.shape)}"
    )
    if right.numel() == 0:
        return
    difference = torch.nan_to_num((left - right).abs(), nan=math.inf)
    # Equal infinities differ by NaN above and still fail: no test expects an infinity.
    worst = float(difference.max())
    size = float(right.abs().max())
    allowed = absolute + relative * (0.0 if math.isnan(size) else size)
    if worst > allowed:
        where = tuple(torch.nonzero(difference == difference.max())[0].tolist())
        raise AssertionError(
            f"{name}: differs by {worst:.3e} (relative {worst / size if size else math.inf:.3e}) "
            f"at {where}: got {float(left[where]):.17g}, expected {float(right[where]):.17g}, "
            f"allowed {allowed:.3e}"
        )


def _double(values: Values) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach().to(device="cpu", dtype=torch.float64)
    return torch.tensor(values, dtype=torch.float64)
