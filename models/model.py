"""The whole language model: embedding, blocks of the pattern, final norm, head with loss.

Plain PyTorch in one process; asks its `LayerProvider` for layers and its `KernelSet` for kernels,
and never which rank it is on. Parameters hold NaN until `models.initialisation` or a checkpoint
fills them. Shape letters: B batch, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.block import Block
from models.config import ModelConfig, SpikingConfig
from models.kernels import KernelSet, default_kernels
from models.layers import LayerProvider, LocalLayers, ParamLayout, Parts
from models.layouts import parameter_layouts, refuse_unsupported
from models.norm import RMSNorm
from models.rotary import Rotary
from models.sequence import SequenceContext
from models.spiking.neurons import Spikes, build_neuron


class Model(nn.Module):
    """A decoder-only language model.

    Args:
        config: shapes and patterns.
        spiking: which neuron sits at the inputs of projections (none by default).
        kernels: attention kernels; the plain torch ones by default.
        layers: layer provider; one process by default.
        recompute: indices of blocks whose activations are computed again in the backward pass.
        loss_chunk_tokens: tokens whose logits exist at a time while the loss is computed.

    Raises:
        ValueError: a pattern that this release does not build, or a block index that is not there.
    """

    def __init__(  # noqa: PLR0913 - the composition root of a model
        self,
        config: ModelConfig,
        *,
        spiking: SpikingConfig | None = None,
        kernels: KernelSet | None = None,
        layers: LayerProvider | None = None,
        recompute: Collection[int] = frozenset(),
        loss_chunk_tokens: int = 1024,
    ) -> None:
        super().__init__()
        refuse_unsupported(config)
        self.config = config
        self.spiking = spiking or SpikingConfig()
        self.recompute = frozenset(recompute)
        self.loss_chunk_tokens = loss_chunk_tokens
        provider = layers or LocalLayers()
        parts = Parts(
            config=config,
            layers=provider,
            kernels=kernels or default_kernels(),
            rotary=Rotary(config),
            build_neuron=lambda: build_neuron(self.spiking, provider.channel_mean_abs),
        )
        self.embedding = provider.embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(
            Block(parts, mixers, layer=index) for index, mixers in enumerate(config.layers.mixers)
        )
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = provider.head(
            config.hidden_size, config.vocab_size, is_tied=config.tie_word_embeddings
        )
        self._check_recompute()

    def forward(
        self,
        tokens: Tensor,
        sequence: SequenceContext,
        *,
        labels: Tensor | None = None,
        spikes: Spikes | None = None,
    ) -> Tensor:
        """Logits `[B, T, V]` of tokens `[B, T]`, or the summed loss of labels `[B, T]`.

        Labels are the next tokens, -100 where nothing is predicted. Results are at least float32.
        """
        hidden = self.hidden_states(tokens, sequence, spikes=spikes)
        return self.apply_head(hidden, labels=labels)

    def hidden_states(
        self, tokens: Tensor, sequence: SequenceContext, *, spikes: Spikes | None = None
    ) -> Tensor:
        """The final-normed residual stream `[B, T, D]` that the head reads."""
        x = self.embedding(tokens)
        for index, block in enumerate(self.blocks):
            if index in self.recompute and torch.is_grad_enabled():
                x = checkpoint(
                    block,
                    x,
                    sequence,
                    spikes,
                    use_reentrant=False,
                    preserve_rng_state=False,
                    context_fn=lambda: (nullcontext(), _without_records(spikes)),
                )
            else:
                x = block(x, sequence, spikes)
        hidden: Tensor = self.final_norm(x)
        return hidden

    @torch.no_grad()
    def token_losses(
        self,
        tokens: Tensor,
        sequence: SequenceContext,
        labels: Tensor,
        *,
        spikes: Spikes | None = None,
    ) -> Tensor:
        """Cross entropy of each token `[B, T]`, 0 where masked, without gradients."""
        hidden = self.hidden_states(tokens, sequence, spikes=spikes)
        return self.apply_head(hidden, labels=labels, per_token=True)

    def apply_head(
        self, hidden: Tensor, *, labels: Tensor | None = None, per_token: bool = False
    ) -> Tensor:
        """Logits or losses of final-normed hidden states `[..., D]`; see `models.layers.Head`."""
        tied = self.embedding.weight if self.config.tie_word_embeddings else None
        out: Tensor = self.head(
            hidden,
            labels,
            tied_weight=tied,
            chunk_tokens=self.loss_chunk_tokens,
            per_token=per_token,
        )
        return out

    def layouts(self) -> dict[str, ParamLayout]:
        """Global shape and sharing of every parameter, by name."""
        return parameter_layouts(self.config)

    def _check_recompute(self) -> None:
        count = len(self.blocks)
        wrong = sorted(index for index in self.recompute if not 0 <= index < count)
        if wrong:
            raise ValueError(
                f"recompute ({wrong}) must be block indices below the number of layers: got "
                f"{count}. Remove them."
            )


def _without_records(spikes: Spikes | None) -> AbstractContextManager[None]:
    """Keep a recomputed forward pass out of the spike statistics."""
    if spikes is None or spikes.recorder is None:
        return nullcontext()
    return spikes.recorder.paused()
