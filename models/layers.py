"""The seam between a model and how its layers are laid out over ranks.

A model asks a `LayerProvider` for its linears, embedding and head instead of importing parallel
ones; `LocalLayers` is plain torch in one process and the oracle of every other provider. How each
parameter may be shared is a `ParamLayout` (the table of all of them: `models.layouts`). Parameters
hold NaN until they are initialised or loaded, so that a forgotten one cannot pass unnoticed.

Shape letters: B batch, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import ModelConfig
from models.distillation import chunked_kl
from models.experts import Experts
from models.kernels import KernelSet
from models.lesson import Lesson
from models.loss import chunked_cross_entropy, chunked_token_losses, logits_of
from models.recomputation import NOTHING, Recomputation
from models.rotary import Rotary
from models.spiking.channels import WHOLE_CHANNELS, Channels
from models.vocabulary import VocabularyShard


@dataclass(frozen=True, slots=True)
class ParamLayout:
    """One parameter's global shape and its place in the mesh.

    `tp_dim` and `ep_dim` are the dims cut over those axes (None: not cut). `partial_axes` are mesh
    axes over which its gradient is partial and must be summed, `replicated_axes` those over which
    it is replicated and counted once. `tied_to` names the parameter it must equal. A state is kept
    and updated by the model itself: it has no gradient and counts as no parameter.
    """

    global_shape: tuple[int, ...]
    tp_dim: int | None = None
    ep_dim: int | None = None
    partial_axes: tuple[str, ...] = ()
    replicated_axes: tuple[str, ...] = ()
    tied_to: str | None = None
    is_state: bool = False


class Linear(nn.Linear):
    """A linear that computes in the dtype of its input, whatever its parameters' dtype."""

    def reset_parameters(self) -> None:
        """Fill with NaN; see the module docstring."""
        for parameter in self.parameters():
            nn.init.constant_(parameter, float("nan"))

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in_features]` to `[..., out_features]`."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Embedding(nn.Module):
    """Token embedding `[V, D]`."""

    def __init__(self, num_embeddings: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((num_embeddings, dim), float("nan")))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens `[B, T]` to `[B, T, D]`."""
        return F.embedding(tokens, self.weight)


class Head(nn.Module):
    """Output projection `[V, D]` with the loss; a tied head owns no weight and is given one.

    Where the vocabulary is cut over ranks, `vocab_size` is this rank's number of rows, `vocabulary`
    describes them and `enter` brings the residual stream in (`LayerProvider.enter`).
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        is_tied: bool,
        vocabulary: VocabularyShard | None = None,
        enter: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self._vocabulary, self._enter = vocabulary, enter
        if not is_tied:
            self.weight = nn.Parameter(torch.full((vocab_size, hidden_size), float("nan")))
        else:
            self.register_parameter("weight", None)

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        *,
        tied_weight: Tensor | None = None,
        chunk_tokens: int = 1024,
        per_token: bool = False,
        lesson: Lesson | None = None,
    ) -> Tensor:
        """Logits `[..., V]`, or with `labels` `[...]` the summed loss, or losses `[...]`.

        A cut vocabulary gives this rank's logits, but whole losses.

        Args:
            hidden: `[..., D]`.
            labels: next tokens, -100 where masked.
            tied_weight: `[V, D]` when the head is tied to the embedding.
            chunk_tokens: tokens whose logits exist at a time while the loss is computed.
            per_token: each token's loss, without gradients, instead of the sum.
            lesson: adds the divergence from a teacher's distribution to the sum.

        Returns:
            At least float32.
        """
        weight: Tensor | None = self.weight if tied_weight is None else tied_weight
        assert weight is not None, "a tied head is given the embedding's weight"
        hidden = self.enter(hidden)
        if labels is None:
            return logits_of(hidden, weight)
        flat, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
        if per_token:
            losses = chunked_token_losses(
                flat, weight, targets, chunk_tokens=chunk_tokens, vocabulary=self._vocabulary
            )
            return losses.view(labels.shape)
        loss = chunked_cross_entropy(
            flat, weight, targets, chunk_tokens=chunk_tokens, vocabulary=self._vocabulary
        )
        if lesson is None or lesson.head is None:
            return loss
        teacher, teacher_weight = lesson.head
        divergence = chunked_kl(
            flat,
            weight,
            teacher.reshape(-1, teacher.shape[-1]),
            teacher_weight,
            targets,
            chunk_tokens=chunk_tokens,
            temperature=lesson.goals.temperature,
            vocabulary=self._vocabulary,
        )
        return lesson.diverge(loss, divergence)

    def enter(self, hidden: Tensor) -> Tensor:
        """The residual stream as the head reads it: all tokens."""
        return hidden if self._enter is None else self._enter(hidden)


class LayerProvider(Protocol):
    """What a model asks for. Linears compute in the dtype of their input."""

    def column_linear(self, in_features: int, out_features: int, *, bias: bool) -> nn.Module:
        """A linear whose output channels may be shared out over ranks."""

    def row_linear(self, in_features: int, out_features: int, *, bias: bool) -> nn.Module:
        """A linear whose input channels may be shared out over ranks."""

    def replicated_linear(self, in_features: int, out_features: int, *, bias: bool) -> nn.Module:
        """A small linear that every rank holds whole."""

    def embedding(self, num_embeddings: int, dim: int) -> nn.Module:
        """The token embedding."""

    def head(self, hidden_size: int, vocab_size: int, *, is_tied: bool) -> nn.Module:
        """The output projection and loss, called as `Head.forward`."""

    def experts(
        self,
        num_experts: int,
        hidden_size: int,
        inner_size: int,
        *,
        neuron: nn.Module | None,
        layer: int,
        activations_again: bool,
    ) -> nn.Module:
        """The routed experts of a layer, called as `Experts.forward` on rows of all tokens.

        Both inner channels and experts may be shared out over ranks. `neuron` sees `cut_channels`;
        `leave` makes their sums whole.
        """

    def enter(self, x: Tensor) -> Tensor:
        """From the residual stream to what column linears read: all tokens `[B, T, ...]`.

        Row linears lead back. Gradients are summed over the ranks that the linears are cut over.
        """

    def leave(self, x: Tensor) -> Tensor:
        """Back to the residual stream, from sums `[B, T, D]` over this rank's channels alone."""

    @property
    def whole_channels(self) -> Channels:
        """The residual stream, as the neurons before column linears see it."""

    @property
    def cut_channels(self) -> Channels:
        """What row linears read, as the neurons before them see it."""


class LocalLayers:
    """Plain torch layers in one process."""

    def column_linear(self, in_features: int, out_features: int, *, bias: bool) -> nn.Module:
        """A whole linear."""
        return Linear(in_features, out_features, bias=bias)

    def row_linear(self, in_features: int, out_features: int, *, bias: bool) -> nn.Module:
        """A whole linear."""
        return Linear(in_features, out_features, bias=bias)

    def replicated_linear(self, in_features: int, out_features: int, *, bias: bool) -> nn.Module:
        """A whole linear."""
        return Linear(in_features, out_features, bias=bias)

    def embedding(self, num_embeddings: int, dim: int) -> nn.Module:
        """A whole embedding."""
        return Embedding(num_embeddings, dim)

    def head(self, hidden_size: int, vocab_size: int, *, is_tied: bool) -> nn.Module:
        """A whole head."""
        return Head(hidden_size, vocab_size, is_tied=is_tied)

    def experts(
        self,
        num_experts: int,
        hidden_size: int,
        inner_size: int,
        *,
        neuron: nn.Module | None,
        layer: int,
        activations_again: bool,
    ) -> nn.Module:
        """All experts, whole."""
        return Experts(
            num_experts,
            hidden_size,
            inner_size,
            neuron=neuron,
            layer=layer,
            activations_again=activations_again,
        )

    whole_channels = WHOLE_CHANNELS
    cut_channels = WHOLE_CHANNELS

    def enter(self, x: Tensor) -> Tensor:
        """The residual stream itself."""
        return x

    def leave(self, x: Tensor) -> Tensor:
        """The residual stream itself."""
        return x


@dataclass(frozen=True, slots=True)
class Parts:
    """What every block of one model is built from."""

    config: ModelConfig
    layers: LayerProvider
    kernels: KernelSet
    rotary: Rotary
    build_neuron: Callable[[Channels], nn.Module | None]
    recompute: Recomputation = NOTHING
