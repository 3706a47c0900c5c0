"""What the training loop and an engine say to each other: verbs, groups, rows. No behaviour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from parallel.boxes import Box

if TYPE_CHECKING:
    from models.spiking.neurons import Spikes


class Microbatch(Protocol):
    """Rows that go through the model at once: three int64 `[rows, T]` tensors on the CPU."""

    @property
    def tokens(self) -> Tensor:
        """Token ids."""

    @property
    def labels(self) -> Tensor:
        """The next token of the same document, -100 where nothing is predicted."""

    @property
    def document_ids(self) -> Tensor:
        """Numbers that change where a document starts."""


class Engine(Protocol):
    """What a training loop needs. Every method is collective: all ranks call it together."""

    def forward_backward(
        self,
        microbatches: Sequence[Microbatch],
        *,
        num_targets: int,
        spikes: Spikes | None = None,
    ) -> dict[str, float]:
        """Gradients of the summed losses of all ranks' rows over `num_targets`; returns them."""

    def clip_and_step(self, lr: float) -> float:
        """Clip, update, forget the gradients; returns the gradient norm before clipping."""

    def expert_loads(self) -> dict[str, float]:
        """Each expert's share of the choices of the last step, as `moe/<layer>/load_<expert>`."""

    def token_losses(self, batch: Microbatch, *, spikes: Spikes | None = None) -> Tensor:
        """Loss of each token `[rows, T]` of this rank's rows, on the CPU, without gradients."""

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Sum of small CPU tensors over data-parallel ranks, the same bits on every rank."""

    def agree(self, values: Tensor, flags: Sequence[bool]) -> tuple[Tensor, tuple[bool, ...]]:
        """Sum of `values` over data-parallel ranks, and which flags any rank at all raised."""

    def sum_by_name(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sum tensors of one shape over all ranks, where a rank may lack some names."""

    @property
    def parameters(self) -> dict[str, Box]:
        """This rank's part of every parameter, in memory shared with the model."""

    def optimizer_state(self) -> dict[str, Box]:
        """This rank's part of the optimizer state as `<state>/<parameter>`, shared likewise."""

    num_updates: int
    """Updates so far; the one scalar of the optimizer state."""


@dataclass(frozen=True, slots=True)
class ParamGroup:
    """Parameters (by name) that share weight decay and a factor on the learning rate."""

    names: tuple[str, ...]
    weight_decay: float
    lr_factor: float


class UpdateRule(Protocol):
    """What an optimizer config must tell; `training.config.OptimizerConfig` does."""

    @property
    def name(self) -> Any:
        """An Enum member `adamw` or `sgd`."""

    @property
    def beta1(self) -> float:
        """Decay of the first moment."""

    @property
    def beta2(self) -> float:
        """Decay of the second moment."""

    @property
    def eps(self) -> float:
        """Added to the root of the second moment."""

    @property
    def clip_norm(self) -> float | None:
        """Largest gradient norm; None does not clip."""
