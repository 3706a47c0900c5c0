"""Which attention kernels a model runs: the two signatures, the table of names, their selection.

Shape letters: B batch, T tokens (Tq queries, Tk keys), N query heads, G key-value heads, H head
dim. The signatures are documented, and slowly defined, in `models.reference`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from models.kernels.sinks import SinkKeys
from models.sequence import SequenceContext

_Loader = TypeVar("_Loader", bound=Callable[[], object])


class LinearAttention(Protocol):
    """Gated linear attention; see `models.reference.linear_attention`."""

    def __call__(  # noqa: PLR0913 - the seam's signature
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        *,
        scale: float,
        sequence: SequenceContext | None,
        initial_state: Tensor | None = None,
        document_state: Tensor | None = None,
        output_final_state: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """`[B, T, N, H]` out and, on request, the last document's state `[B, G, H, H]`.

        A row's first document goes on with `initial_state` `[B, G, H, H]` where that is given;
        every other one starts from `document_state` `[G, H, H]`. So a decoder passes both: the
        state that it carries, None at first, and the one that documents start from.
        """


class SoftmaxAttention(Protocol):
    """Causal softmax attention; see `models.reference.softmax_attention`."""

    def __call__(  # noqa: PLR0913 - the seam's signature
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        window: int | None,
        sequence: SequenceContext | None,
        sinks: SinkKeys | None = None,
    ) -> Tensor:
        """`[B, Tq, N, H]` out; `window` counts the visible keys, the query's own included.

        Every query sees all `sinks` besides, whatever its window and document.
        """


@dataclass(frozen=True, slots=True)
class KernelSet:
    """The kernels of one model, and their names for logs and reports."""

    linear_attention: LinearAttention
    softmax_attention: SoftmaxAttention
    names: dict[str, str]


def default_kernels() -> KernelSet:
    """Plain torch everywhere: exact chunked gated linear attention and blocked softmax."""
    return kernel_set(linear="chunked", softmax="blocked")


def kernel_set(*, linear: str, softmax: str) -> KernelSet:
    """Kernels by name.

    Args:
        linear: `chunked` (plain torch), `fla` (Triton kernels) or `reference`.
        softmax: `blocked` (plain torch), `flash_attn`, `flex` or `reference`.

    Raises:
        ValueError: a name that is not one of these, or one whose library is not installed.
    """
    return KernelSet(
        linear_attention=_choose("linear", linear, _LINEAR)(),
        softmax_attention=_choose("softmax", softmax, _SOFTMAX)(),
        names={"linear_attention": linear, "softmax_attention": softmax},
    )


def _choose(field: str, name: str, table: dict[str, _Loader]) -> _Loader:
    if name not in table:
        raise ValueError(
            f"{field} ({name!r}) must be one of {', '.join(table)}. Choose one of these kernels."
        )
    return table[name]


def _chunked() -> LinearAttention:
    from models.kernels.chunked import linear_attention

    return linear_attention


def _fla() -> LinearAttention:
    from models.kernels.fla import linear_attention, require

    require()
    return linear_attention


def _reference_linear() -> LinearAttention:
    from models.reference import linear_attention

    return linear_attention


def _blocked() -> SoftmaxAttention:
    from models.kernels.blocked import softmax_attention

    return softmax_attention


def _flash_attn() -> SoftmaxAttention:
    from models.kernels.flash import require, softmax_attention

    require()
    return softmax_attention


def _flex() -> SoftmaxAttention:
    from models.kernels.flex import require, softmax_attention

    require()
    return softmax_attention


def _reference_softmax() -> SoftmaxAttention:
    from models.reference import softmax_attention

    return softmax_attention


_LINEAR: dict[str, Callable[[], LinearAttention]] = {
    "chunked": _chunked,
    "fla": _fla,
    "reference": _reference_linear,
}
_SOFTMAX: dict[str, Callable[[], SoftmaxAttention]] = {
    "blocked": _blocked,
    "flash_attn": _flash_attn,
    "flex": _flex,
    "reference": _reference_softmax,
}
