"""What `recomputed` promises of any function: values, number of calls, what is kept and let go."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from models.recompute import recomputed
from models.spiking.neurons import Spikes
from models.spiking.recorder import SpikeRecorder
from tests.support.closeness import assert_close
from tests.support.kept_bytes import kept_bytes

ROWS, WIDTH, OUT = 6, 5, 3
FLOAT64 = 8


class Calls:
    """A function of one tensor whose gradient needs its result, and how often it ran."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.count += 1
        return x.exp()


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()


def two_readers(
    function: Callable[[Tensor], Tensor], x: Tensor, weights: tuple[Tensor, Tensor], when: bool
) -> Tensor:
    with recomputed(function, x, when=when) as y:
        return (y @ weights[0]).sum() + (y.t()[1:4] * weights[1]).square().sum()


def operands() -> tuple[Tensor, tuple[Tensor, Tensor]]:
    return draw(ROWS, WIDTH), (draw(WIDTH, OUT, seed=1), draw(3, ROWS, seed=2))


def gradients(function: Calls, when: bool) -> list[Tensor]:
    x, weights = operands()
    loss = two_readers(function, x, weights, when)
    return [loss, *torch.autograd.grad(loss, (x, *weights))]


def test_no_bit_changes_and_the_function_runs_once_more_for_all_readers() -> None:
    calls = Calls()
    for actual, expected in zip(gradients(calls, True), gradients(Calls(), False), strict=True):
        assert torch.equal(actual, expected)
    assert calls.count == 2


def test_only_the_arguments_and_what_readers_make_are_kept() -> None:
    x, weights = operands()
    kept = {
        when: kept_bytes(
            lambda when=when: two_readers(torch.exp, x, weights, when), besides=(x, *weights)
        )
        for when in (False, True)
    }
    assert kept[False] - kept[True] == ROWS * WIDTH * FLOAT64


def test_nothing_is_left_after_the_backward_pass() -> None:
    x, weights = operands()

    def work() -> None:
        loss = two_readers(torch.exp, x, weights, True)
        torch.autograd.grad(loss, (x, *weights))

    assert kept_bytes(work, besides=(x, *weights)) == 0


def test_a_second_backward_pass_computes_again() -> None:
    calls = Calls()
    x, weights = operands()
    loss = two_readers(calls, x, weights, True)
    first = torch.autograd.grad(loss, (x, *weights), retain_graph=True)
    second = torch.autograd.grad(loss, (x, *weights))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert calls.count == 3


def test_a_backward_split_into_inputs_and_weights_keeps_nothing_in_between() -> None:
    """As zero-bubble schedules split it: inputs first, weights when there is time."""
    calls = Calls()
    x, weights = operands()
    expected = gradients(Calls(), False)[1:]
    found: list[Tensor] = []

    def forward() -> Tensor:
        return two_readers(calls, x, weights, True)

    def forward_and_inputs() -> Tensor:
        loss = two_readers(calls, x, weights, True)
        found[:] = torch.autograd.grad(loss, (x,), retain_graph=True)
        return loss

    after_forward = kept_bytes(forward, besides=(x, *weights))
    after_inputs = kept_bytes(forward_and_inputs, besides=(x, *weights))
    assert after_inputs - after_forward == found[0].nbytes
    calls.count = 0
    loss = forward_and_inputs()
    found += torch.autograd.grad(loss, weights)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert calls.count == 3


def test_an_argument_from_an_outer_block_is_not_kept() -> None:
    x, weights = operands()

    def nested(when: bool) -> Tensor:
        with (
            recomputed(torch.exp, x, when=when) as y,
            recomputed(torch.sigmoid, y, when=when) as z,
        ):
            return (z @ weights[0]).sum()

    def kept(when: bool) -> int:
        return kept_bytes(lambda: nested(when), besides=(x, *weights))

    assert kept(False) - kept(True) == 2 * ROWS * WIDTH * FLOAT64
    expected = torch.autograd.grad(nested(False), (x, weights[0]))
    for actual, wanted in zip(
        torch.autograd.grad(nested(True), (x, weights[0])), expected, strict=True
    ):
        assert torch.equal(actual, wanted)


def test_of_a_function_with_several_outputs_none_is_kept_and_all_come_back_at_once() -> None:
    calls = Calls()
    x, weights = operands()

    def both(x: Tensor) -> tuple[Tensor, ...]:
        return calls(x), x.sin()

    def product(pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0] * pair[1]

    def loss(when: bool) -> Tensor:
        with (
            recomputed(both, x, when=when) as pair,
            recomputed(product, pair, when=when) as y,
        ):
            nested = (y @ weights[0]).sum()
        with recomputed(both, x, when=when) as (first, second):
            read = (first @ weights[0]).sum() + (second.t()[1:4] * weights[1]).sum()
        return nested + read

    kept = {when: kept_bytes(lambda when=when: loss(when), besides=(x, *weights))
            for when in (False, True)}  # fmt: skip
    # Both outputs for each reader, the product; in the first pair their own gradients need no more.
    assert kept[False] - kept[True] == 5 * ROWS * WIDTH * FLOAT64
    expected = torch.autograd.grad(loss(False), (x, *weights))
    calls.count = 0
    actual = torch.autograd.grad(loss(True), (x, *weights))
    assert calls.count == 4
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


class Scale(nn.Module):
    """A module with a parameter, called through its hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


@pytest.mark.parametrize("is_function", [True, False], ids=["function", "argument"])
def test_hooks_of_modules_run_in_the_forward_pass_only(is_function: bool) -> None:
    hooked: list[nn.Module] = []
    scale = Scale()
    scale.register_forward_hook(lambda module, *_: hooked.append(module))
    x, weights = operands()
    function, arguments = scale, (x,)
    if not is_function:
        function, arguments = (lambda x, modules: modules[0](x)), (x, (scale, None))
    with recomputed(function, *arguments) as y:
        loss = (y @ weights[0]).sum()
    loss.backward()
    assert hooked == [scale]
    expected = x.detach().t() @ torch.ones(ROWS, OUT, dtype=torch.float64) @ weights[0].t()
    assert_close(scale.weight.grad, expected.diagonal(), relative=1e-14)


def test_spikes_come_back_without_their_recorder() -> None:
    given: list[SpikeRecorder | None] = []

    def function(x: Tensor, spikes: Spikes) -> Tensor:
        given.append(spikes.recorder)
        return x.exp()

    recorder = SpikeRecorder(4)
    x, weights = operands()
    with recomputed(function, x, Spikes(k=3.0, recorder=recorder)) as y:
        loss = (y @ weights[0]).sum()
    loss.backward()
    assert given == [recorder, None]


def test_without_gradients_it_is_a_plain_call() -> None:
    x, weights = operands()
    calls = Calls()
    with (
        torch.no_grad(),
        torch.autograd.graph.disable_saved_tensors_hooks("there is nothing to watch"),
        recomputed(calls, x) as y,
    ):
        assert torch.equal(y, x.exp())
    assert calls.count == 1
    frozen = x.detach()
    with recomputed(calls, frozen) as y:
        loss = (y @ weights[0]).sum()
    (gradient,) = torch.autograd.grad(loss, weights[0])
    assert_close(gradient, frozen.exp().sum(0)[:, None].expand(WIDTH, OUT), relative=1e-14)


def test_a_plain_call_lets_go_of_its_arguments() -> None:
    arguments = [torch.ones(2)]
    reference = weakref.ref(arguments[0])
    with recomputed(torch.neg, arguments.pop(), when=False) as y:
        assert reference() is None
        assert y.tolist() == [-1.0, -1.0]


def test_what_keeps_its_own_output_inside_goes_with_it() -> None:
    x, _ = operands()
    with recomputed(Calls(), x):
        other = draw(ROWS, seed=3).exp()
    storage = StorageWeakRef(other.untyped_storage())
    assert not storage.expired()
    # No backward pass comes by to let go of what is kept.
    del other
    assert storage.expired()


def test_a_function_that_does_something_else_the_second_time_fails() -> None:
    calls = Calls()
    x, weights = operands()

    def function(x: Tensor) -> Tensor:
        return calls(x) if calls.count else calls(x) * 2.0 * calls(x)

    with recomputed(function, x) as y:
        loss = (y @ weights[0]).sum()
    with pytest.raises(AssertionError, match="the second call must do what the first one did"):
        loss.backward()
