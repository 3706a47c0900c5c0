"""The whole language model: embedding, blocks of the pattern, final norm, head with loss.

Plain PyTorch in one process; asks its `LayerProvider` for layers and its `KernelSet` for kernels,
and never which rank it is on. Parameters hold NaN until `models.initialisation` or a checkpoint
fills them. Shape letters: B batch, T tokens, S sinks, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.block import Block, Blocks
from models.config import ModelConfig, SpikingConfig
from models.kernels import KernelSet, default_kernels
from models.layers import LayerProvider, LocalLayers, ParamLayout, Parts
from models.layouts import parameter_layouts
from models.lesson import Lesson
from models.norm import RMSNorm
from models.part import ModelPart
from models.recomputation import NOTHING, Recomputation
from models.rotary import Rotary
from models.routing import Routing
from models.sequence import SequenceContext
from models.sinks import SinkTokens
from models.spiking.neurons import Spikes, build_neuron


class Model(nn.Module):
    """A decoder-only language model.

    Args:
        config: shapes and patterns.
        spiking: which neuron sits at the inputs of projections (none by default).
        kernels: attention kernels; the plain torch ones by default.
        layers: layer provider; one process by default.
        recompute: what is computed again in the backward pass.
        part: the stretch to build, everything by default. Parameters keep their global names.
        loss_chunk_tokens: tokens whose logits exist at a time while the loss is computed.

    Raises:
        ValueError: a `recompute` for another model.
    """

    def __init__(  # noqa: PLR0913 - the composition root of a model
        self,
        config: ModelConfig,
        *,
        spiking: SpikingConfig | None = None,
        kernels: KernelSet | None = None,
        layers: LayerProvider | None = None,
        recompute: Recomputation = NOTHING,
        part: ModelPart | None = None,
        loss_chunk_tokens: int = 1024,
    ) -> None:
        super().__init__()
        recompute.check(config)
        self.config = config
        self.part = ModelPart.whole(config) if part is None else part
        self.spiking = spiking or SpikingConfig()
        self.recompute = recompute
        self.loss_chunk_tokens = loss_chunk_tokens
        provider = layers or LocalLayers()
        parts = Parts(
            config=config,
            layers=provider,
            kernels=kernels or default_kernels(),
            rotary=Rotary(config),
            build_neuron=lambda channels: build_neuron(self.spiking, channels),
            recompute=recompute,
        )
        self.embedding: nn.Module | None = None
        self.sinks: SinkTokens | None = None
        self.final_norm: RMSNorm | None = None
        self.head: nn.Module | None = None
        if self.part.has_embedding:
            self.embedding = provider.embedding(config.vocab_size, config.hidden_size)
            if config.uses_sinks:
                self.sinks = SinkTokens(
                    config.sinks.num_tokens,
                    config.hidden_size,
                    share=provider.whole_channels.share,
                )
        mixers = config.layers.mixers
        self.blocks = Blocks(Block(parts, mixers[i], layer=i) for i in self.part.layers)
        if self.part.has_head:
            self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.head = provider.head(
                config.hidden_size, config.vocab_size, is_tied=self.is_tied_here
            )

    @property
    def is_tied_here(self) -> bool:
        """Whether the head reads the embedding of this very part."""
        return self.config.tie_word_embeddings and self.part.has_embedding

    def forward(  # noqa: PLR0913 - all that one pass depends on
        self,
        tokens: Tensor,
        sequence: SequenceContext,
        *,
        sinks: Tensor | None = None,
        labels: Tensor | None = None,
        spikes: Spikes | None = None,
        routing: Routing | None = None,
        lesson: Lesson | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits `[B, T, V]` of tokens `[B, T]`, or the summed loss of labels `[B, T]`.

        Labels are the next tokens, -100 where nothing is predicted. Results are at least float32.
        A `lesson` adds what is learned from a teacher to the loss. Expert layers train with a
        `routing`; their own losses are in the gradient alone.
        A part without the embedding takes the residual stream instead of tokens, and one without
        the head returns it; where a model has sinks, their stream `[1, S, D]` too.
        """
        observe = None if lesson is None else lesson.compare
        hidden, sinks = self.streams(
            tokens, sequence, sinks=sinks, spikes=spikes, routing=routing, observe=observe
        )
        if self.head is None:
            return hidden if sinks is None else (hidden, sinks)
        return self.apply_head(hidden, labels=labels, lesson=lesson)

    def hidden_states(
        self,
        tokens: Tensor,
        sequence: SequenceContext,
        *,
        spikes: Spikes | None = None,
        observe: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The residual stream `[B, T, D]` after the last layer, final-normed before a head.

        `observe` is given each layer and the stream after it, and returns the stream to go on with.
        """
        return self.streams(tokens, sequence, spikes=spikes, observe=observe)[0]

    def streams(
        self,
        tokens: Tensor,
        sequence: SequenceContext,
        *,
        sinks: Tensor | None = None,
        spikes: Spikes | None = None,
        routing: Routing | None = None,
        observe: Callable[[int, Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As `hidden_states`, from and to the streams of tokens and, where it has any, of sinks."""
        x = tokens if self.embedding is None else self.embedding(tokens)
        sinks = sinks if self.sinks is None else self.sinks()
        for block in self.blocks:
            out = self._run(block, (x, sequence, spikes, routing, sinks))
            x, sinks = out if isinstance(out, tuple) else (out, None)
            if observe is not None:
                x = observe(block.layer, x)
        return x if self.final_norm is None else self.final_norm(x), sinks

    def _run(self, block: Block, arguments: tuple[Any, ...]) -> Tensor | tuple[Tensor, Tensor]:
        """A block, computed again in the backward pass if it is to be."""
        again = block.layer in self.recompute.blocks and torch.is_grad_enabled()
        run = block if not again else partial(_checkpointed, block)
        out: Tensor | tuple[Tensor, Tensor] = run(*arguments)
        return out

    @torch.no_grad()
    def token_losses(
        self,
        tokens: Tensor,
        sequence: SequenceContext,
        labels: Tensor,
        *,
        sinks: Tensor | None = None,
        spikes: Spikes | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Cross entropy of each token `[B, T]`, 0 where masked, without gradients.

        Parts take and return the residual stream, and that of sinks, as in `forward`.
        """
        hidden, sinks = self.streams(tokens, sequence, sinks=sinks, spikes=spikes)
        if self.head is None:
            return hidden if sinks is None else (hidden, sinks)
        return self.apply_head(hidden, labels=labels, per_token=True)

    def apply_head(
        self,
        hidden: Tensor,
        *,
        labels: Tensor | None = None,
        per_token: bool = False,
        lesson: Lesson | None = None,
    ) -> Tensor:
        """Logits or losses of final-normed hidden states `[..., D]`; see `models.layers.Head`."""
        assert self.head is not None, "this part of the model has no head"
        tied = self.head_weight if self.is_tied_here else None
        out: Tensor = self.head(
            hidden,
            labels,
            tied_weight=tied,
            chunk_tokens=self.loss_chunk_tokens,
            per_token=per_token,
            lesson=lesson,
        )
        return out

    @property
    def head_weight(self) -> Tensor:
        """The head's rows, its own or the embedding's."""
        owner = self.embedding if self.is_tied_here else self.head
        assert owner is not None, "this part of the model has no head"
        weight = owner.weight
        assert isinstance(weight, Tensor)
        return weight

    def layouts(self) -> dict[str, ParamLayout]:
        """Global shape and sharing of every parameter of the whole model, by name."""
        return parameter_layouts(self.config)


def _checkpointed(
    block: Block,
    x: Tensor,
    sequence: SequenceContext,
    spikes: Spikes | None,
    routing: Routing | None,
    sinks: Tensor | None,
) -> Any:
    return checkpoint(
        block,
        x,
        sequence,
        spikes,
        routing,
        sinks,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), _without_records(spikes, routing)),
    )


@contextmanager
def _without_records(spikes: Spikes | None, routing: Routing | None) -> Iterator[None]:
    """Keep a recomputed forward pass out of all statistics."""
    with ExitStack() as stack:
        for source in (spikes, routing):
            if source is not None and source.recorder is not None:
                stack.enter_context(source.recorder.paused())
        yield
