"""Experts cut over ranks: which ep is refused, and boxes that hold every parameter once."""

from __future__ import annotations

import re

import pytest

from models.expert_config import ExpertConfig
from parallel.experts import check_expert_parallel
from tests.models.tiny import tiny_config


@pytest.mark.parametrize(
    ("num_experts", "ep", "message"),
    [
        (6, 4, "parallel.ep (4) must divide model.moe.num_experts: got 6. Set it to 3 or 6, or"),
        (2, 4, "got 2. Set it to 2, or change model.moe.num_experts."),
        (5, 2, "got 5. Set it to 1 or 5, or"),
    ],
)
def test_an_ep_that_does_not_divide_the_experts_is_refused(
    num_experts: int, ep: int, message: str
) -> None:
    config = tiny_config(mixers="F F", ffns="d e", moe=ExpertConfig(num_experts=num_experts))
    with pytest.raises(ValueError, match=re.escape(message)):
        check_expert_parallel(config, ep)


def test_an_ep_that_divides_them_is_taken() -> None:
    moe = ExpertConfig(num_experts=6)
    for ep in (1, 2, 3, 6):
        check_expert_parallel(tiny_config(mixers="F F", ffns="d e", moe=moe), ep)
    check_expert_parallel(tiny_config(mixers="F F", ffns="d d", moe=moe), 4)
