"""Computing something again in the backward pass instead of keeping it.

torch's checkpoint drops what a function keeps inside; but a norm's output, say, is kept by nobody
except the linears that read it. So `recomputed` also watches what the readers of an output keep and
puts a note in its place. The first note that is asked for in the backward pass has the function run
again, for all of them. Which parts of a model use it is `models.recomputation`'s.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from models.routing import Routing
from models.spiking.neurons import Spikes

Output = TypeVar("Output", Tensor, tuple[Tensor, ...])


@contextmanager
def recomputed(
    function: Callable[..., Output], *arguments: Any, when: bool = True
) -> Iterator[Output]:
    """The output of `function(*arguments)`, of which no operation inside the block keeps anything.

    Neither do the operations of `function`. What any of them would have kept is computed again when
    the backward pass asks, once for all of them, by another call with the same arguments: tensors,
    also in tuples, are kept; a module (`function` or an argument) is called through its `forward`,
    without the hooks that ran the first time; `Spikes` and `Routing` come without their recorder.
    The output may be a tuple of tensors. Blocks nest: an argument that is the output of an outer
    one is not kept either. Only the innermost block watches what is kept, so an outer output has no
    other reader than such an argument there.

    Args:
        function: deterministic, reads nothing that changes before the backward pass.
        arguments: of `function`.
        when: whether to do so at all; without gradients nothing is kept anyway.
    """
    if not when or not torch.is_grad_enabled():
        output = function(*arguments)
        del arguments  # Nothing that is not kept should live as long as the block.
        yield output
        return
    call = _Call(function, arguments)
    with saved_tensors_hooks(call.keep_inner, _value):
        output = function(*arguments)
    del arguments
    # A storage's address names it as long as it lives, and this frame holds the output.
    addresses = [x.untyped_storage().data_ptr() for x in _all_of(output)]
    with saved_tensors_hooks(lambda x: call.keep_output(x, addresses), _value):
        yield output


def unobserved(value: Any) -> Any:
    """What a second call in one forward pass is made with, as in `recomputed`; also in tuples.

    FSDP knows the modules of a unit by the calls that its hooks see, one of each: others go past
    them, after the first call of the unit.
    """
    return _map(_second_time, value)


@dataclass(frozen=True, slots=True)
class _View:
    """A view of one of the outputs."""

    output: int
    size: Sequence[int]
    stride: Sequence[int]
    offset: int


class _Note:
    """Stands for a tensor that some operation wanted to keep; holds it for a moment only."""

    __slots__ = ("__weakref__", "call", "tensor", "view")

    def __init__(self, call: _Call, view: _View | None = None) -> None:
        self.call, self.view = call, view
        self.tensor: Tensor | None = None

    def value(self) -> Tensor:
        """The tensor, computed again unless another note has just asked; given away once."""
        if self.tensor is None:
            self.call.repeat()
        tensor, self.tensor = self.tensor, None
        assert tensor is not None
        return tensor


class _Call:
    """One call, its arguments, and the notes that wait for what it computes.

    Notes know their call. It must not keep notes alive, whose operations may be gone.
    """

    def __init__(self, function: Callable[..., Output], arguments: tuple[Any, ...]) -> None:
        tensors: list[Tensor] = []

        def for_later(argument: Any) -> Any:
            if not isinstance(argument, Tensor):
                return _second_time(argument)
            tensors.append(argument)
            return _Kept(len(tensors) - 1, argument.requires_grad)

        self._function = _second_time(function)
        self._arguments = _map(for_later, arguments)
        anchor = torch.empty(0, requires_grad=True)
        self._tensors: Tensor = _Keep.apply(anchor, *tensors)  # type: ignore[no-untyped-call]
        self._inner: list[weakref.ref[_Note]] = []
        self._views: list[weakref.ref[_Note]] = []

    def keep_inner(self, _: Tensor) -> _Note:
        """What an operation of the function wants to keep: known by its turn."""
        note = _Note(self)
        self._inner.append(weakref.ref(note))
        return note

    def keep_output(self, x: Tensor, addresses: Sequence[int]) -> _Note | Tensor:
        """What a later operation keeps: a note if it is an output or a view of one."""
        address = x.untyped_storage().data_ptr()
        if address == 0 or address not in addresses:
            # An operation that keeps its own output, with its graph, would keep itself: for ever
            # where no backward pass comes by.
            return x if x.grad_fn is None else x.detach()
        output = addresses.index(address)
        note = _Note(self, _View(output, x.shape, x.stride(), int(x.storage_offset())))
        self._views.append(weakref.ref(note))
        return note

    def repeat(self) -> None:
        """Call again and give every living note its tensor."""
        arguments = self._arguments_again()
        inner: list[Tensor] = []
        with torch.enable_grad(), saved_tensors_hooks(lambda x: inner.append(x.detach()), _value):
            outputs = [x.detach() for x in _all_of(self._function(*arguments))]
        assert len(inner) == len(self._inner), "the second call must do what the first one did"
        for reference, tensor in zip(self._inner, inner, strict=True):
            if (note := reference()) is not None:
                note.tensor = tensor
        for reference in self._views:
            if (note := reference()) is not None and (view := note.view) is not None:
                output = outputs[view.output]
                note.tensor = output.as_strided(view.size, view.stride, view.offset)

    def _arguments_again(self) -> tuple[Any, ...]:
        tensors = self._tensors.grad_fn.saved_tensors  # type: ignore[union-attr]

        def again(argument: Any) -> Any:
            if not isinstance(argument, _Kept):
                return argument
            return tensors[argument.index].detach().requires_grad_(argument.requires_grad)

        arguments: tuple[Any, ...] = _map(again, self._arguments)
        return arguments


@dataclass(frozen=True, slots=True)
class _Kept:
    """Where a tensor argument is kept."""

    index: int
    requires_grad: bool


class _Keep(torch.autograd.Function):
    """Keeps tensors as any operation does, so that an outer block can drop them."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise AssertionError("nothing is computed from the anchor")


def _all_of(output: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply to everything in nested tuples."""
    if isinstance(value, tuple):
        return tuple(_map(function, each) for each in value)
    return function(value)


def _second_time(value: Any) -> Any:
    """A module without its hooks, what records without its recorder, anything else as it is."""
    if isinstance(value, nn.Module):
        return value.forward
    if isinstance(value, Spikes | Routing):
        return replace(value, recorder=None)
    return value


def _value(kept: _Note | Tensor) -> Tensor:
    return kept.value() if isinstance(kept, _Note) else kept
