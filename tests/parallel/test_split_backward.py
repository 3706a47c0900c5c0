"""The start-up self-test of zero_bubble: right here, and refused where a gradient is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed.pipelining._backward as split

from parallel.split_backward import check_split_backward, find_defect


def test_this_torch_is_right() -> None:
    assert find_defect() is None
    check_split_backward()


def test_a_wrong_gradient_of_a_weight_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = split.stage_backward_weight

    def doubled(weights: Any, groups: Any) -> None:
        parameters = list(weights)
        right(iter(parameters), groups)
        parameters[0].grad *= 2

    monkeypatch.setattr(split, "stage_backward_weight", doubled)
    message = r"parallel\.schedule \(zero_bubble\) must .* wrong gradient of twice"
    with pytest.raises(ValueError, match=message):
        check_split_backward()


def test_a_wrong_gradient_of_the_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = split.stage_backward_input

    def doubled(outputs: Any, grads: Any, inputs: Any, weights: Any) -> Any:
        result = right(outputs, grads, inputs, weights)
        inputs[0].grad *= 2
        return result

    monkeypatch.setattr(split, "stage_backward_input", doubled)
    with pytest.raises(ValueError, match="wrong gradient of the input"):
        check_split_backward()


def test_a_torch_without_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(split, "stage_backward_weight")
    with pytest.raises(ValueError, match="has no split backward"):
        check_split_backward()
