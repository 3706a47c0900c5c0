"""What every mixer core is: the part between a mixer's projections, from heads to head outputs.

Shape letters: B batch, T tokens, S sinks, D hidden, N query heads, H head dim.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from models.kernels import SinkKeys
from models.norm import RMSNorm
from models.projections import Heads
from models.sequence import SequenceContext

Operands = tuple[Any, ...]
"""What a core needs besides heads: tensors that are kept where it runs again, and modules."""
SinkMemory = SinkKeys | Tensor | None
"""What a core's tokens see of sinks: keys (F, S), or the state that documents start from (L)."""


class MixerCore(nn.Module):
    """Mixes tokens; its submodules belong to the mixer or the branch that it is the core of.

    A core holds no parameter of its own, only submodules: whoever adopts those has them all.
    """

    head_norm: RMSNorm | None
    has_sinks: bool
    """Whether sink tokens run through, if the model has any."""

    def operands(self, entered: Tensor, sequence: SequenceContext) -> Operands:
        """What `attend` needs besides heads, from what the projections read `[B, T, D]`."""
        raise NotImplementedError

    def sink_operands(self, entered: Tensor) -> Operands:
        """The same for the heads of sinks, from `[1, S, D]`; its modules are `unobserved`."""
        raise NotImplementedError

    def attend(
        self,
        heads: Heads,
        operands: Operands,
        sequence: SequenceContext,
        sinks: SinkMemory = None,
    ) -> Tensor:
        """Head outputs `[B, T, N, H]` of normed heads, before `head_norm`, within documents."""
        raise NotImplementedError

    def attend_sinks(self, heads: Heads, operands: Operands) -> tuple[Tensor, SinkMemory]:
        """Head outputs `[1, S, N, H]` of sinks among themselves, and what tokens see of them."""
        raise NotImplementedError

    def begin(self, sinks: SinkMemory) -> Any:
        """What is remembered before the first token, for `extend`."""
        raise NotImplementedError

    def extend(self, heads: Heads, entered: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Head outputs of the next n tokens after what `state` holds (None: nothing), and the next.

        The given state may be changed in place and must not be used again.
        """
        raise NotImplementedError
