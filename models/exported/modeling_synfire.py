"""Synfire models for transformers: softmax, sliding-window and gated linear mixers in any pattern.

Plain torch, on any device. Padding may lie anywhere in a row: tokens compute as if it were not
there. Decoding remembers a matrix for each linear mixer, one window for each sliding one.
Shape letters: B rows, T tokens, D hidden, V vocabulary, S sink tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_synfire import SynfireConfig
from .experts_synfire import Router, Stack, build_feed_forward
from .kernels_synfire import Place, State, Stream, rope_frequencies, rotation_of, widened
from .layers_synfire import RMSNorm, build_mixer


class SynfireCache(Cache):
    """What each layer remembers, and how many tokens each row has had.

    Linear mixers cannot forget their last tokens, so `generate` takes no assistant model.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, config: SynfireConfig) -> None:
        super().__init__(layers=[])
        self.states: list[State] = [{} for _ in config.layer_mixers]
        self.sinks: list[State] | None = None
        self.num_tokens: Tensor | None = None
        self.num_seen = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens so far, padding included."""
        return self.num_seen

    def batch_select_indices(self, indices: Tensor) -> None:
        """Rows by index."""
        if self.num_tokens is None:
            return
        self.num_tokens = self.num_tokens.index_select(0, indices.to(self.num_tokens.device))
        for state in self.states:
            for name, value in state.items():
                state[name] = value.index_select(0, indices.to(value.device))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows by index, as beams go on."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row several times."""
        if self.num_tokens is not None:
            rows = torch.arange(len(self.num_tokens), device=self.num_tokens.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget all tokens."""
        self.states = [{} for _ in self.states]
        self.num_tokens, self.num_seen = None, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: what a matrix has summed up stays in it."""
        raise ValueError(
            f"crop ({tokens_to_remove}) must not be asked of a SynfireCache: linear mixers cannot "
            "forget. Start again from an empty cache."
        )


class SynfireBlock(nn.Module):
    """A mixer (or none), then a feed-forward layer, each normed before and added after."""

    def __init__(self, config: SynfireConfig, layer: int) -> None:
        super().__init__()
        letters = config.layer_mixers[layer]
        self.mixer: nn.Module | None = None
        if letters != "_":
            self.mixer_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.mixer = build_mixer(config, letters)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn = build_feed_forward(config, config.layer_ffns[layer], layer)

    def forward(self, x: Tensor, stream: Stream, positions: Tensor) -> Tensor:
        """Map `[B, T, D]` to the same."""
        if self.mixer is not None:
            mixed = self.mixer(self.mixer_norm(x), stream)
            x = x if mixed is None else x + mixed
        out: Tensor = x + self.ffn(self.ffn_norm(x), positions)
        return out


class SynfirePreTrainedModel(PreTrainedModel):
    """What transformers asks of any model."""

    config_class = SynfireConfig
    base_model_prefix = "model"
    _no_split_modules = ["SynfireBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _is_stateful = True
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = [
        "mixer_norm", "ffn_norm", "final_norm", "q_norm", "k_norm", "head_norm", "output_norm",
        "gate_down", "gate_up", "merge", "router",
    ]  # fmt: skip

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Stack | Router):
            nn.init.normal_(module.weight, std=self.config.initializer_range)


class SynfireModel(SynfirePreTrainedModel):
    """Embedding, blocks and the last norm."""

    def __init__(self, config: SynfireConfig) -> None:
        super().__init__(config)
        self.embedding: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.sinks: nn.Embedding | None = None
        if config.sinks["num_tokens"]:
            self.sinks = nn.Embedding(config.sinks["num_tokens"], config.hidden_size)
        self.blocks = nn.ModuleList(
            SynfireBlock(config, layer) for layer in range(len(config.layer_mixers))
        )
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Of tokens."""
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace them."""
        self.embedding = value

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        cache: SynfireCache | None = None,
    ) -> tuple[Tensor, ...]:
        """The residual stream `[B, T, D]` before each block, then the final-normed one.

        `attention_mask` `[B, all tokens so far]` is 0 where a token is padding.
        """
        x, place, order = _without_inner_padding(inputs_embeds, attention_mask, cache)
        frequencies, scale = rope_frequencies(self.config)
        rotation = rotation_of(place.positions, frequencies, scale, x.dtype)
        sinks = self._sinks(x.dtype) if cache is None or cache.sinks is None else cache.sinks
        streams = []
        for layer, block in enumerate(self.blocks):
            streams.append(x)
            state = None if cache is None else cache.states[layer]
            x = block(x, Stream(place, rotation, state, sinks[layer]), place.positions)
        streams.append(self.final_norm(x))
        if cache is not None:
            cache.sinks, cache.num_tokens = sinks, place.num_after
            cache.num_seen += place.num_tokens
        if order is None:
            return tuple(streams)
        back = order.argsort(dim=1)[..., None].expand_as(x)
        return tuple(stream.gather(1, back) for stream in streams)

    def _sinks(self, dtype: torch.dtype) -> list[State]:
        """What sink tokens leave for tokens, by layer; they see each other alone."""
        left: list[State] = [{} for _ in self.blocks]
        if self.sinks is None:
            return left
        x = self.sinks.weight[None].to(dtype)
        before = torch.arange(-x.shape[1], 0, device=x.device)[None]
        kind, rotation = self.config.sinks["rope"], None
        if kind != "none":
            where = before if kind == "before" else before + x.shape[1]
            rotation = rotation_of(where, *rope_frequencies(self.config), dtype)
        for block, own in zip(self.blocks, left, strict=True):
            x = block(x, Stream(None, rotation, sinks=own), before)
        return left


def _without_inner_padding(
    x: Tensor, mask: Tensor | None, cache: SynfireCache | None
) -> tuple[Tensor, Place, Tensor | None]:
    """Rows `[B, T, D]` with all padding on the left, where they stand, and the order of tokens.

    Raises:
        ValueError: a mask that does not cover the tokens so far.
    """
    rows, new = x.shape[:2]
    seen = 0 if cache is None else cache.num_seen
    before = None if cache is None else cache.num_tokens
    if before is None:
        before = torch.zeros(rows, dtype=torch.int64, device=x.device)
    if len(before) != rows:
        raise ValueError(
            f"past_key_values ({len(before)} rows) must have as many rows as the input: got {rows}."
        )
    if mask is not None and mask.shape != (rows, seen + new):
        raise ValueError(
            f"attention_mask {tuple(mask.shape)} must cover each row's tokens so far: got "
            f"{(rows, seen + new)} of them. Positions come from it; other masks are not known."
        )
    is_real = None if mask is None else mask[:, seen:].to(x.device) != 0
    if is_real is None or bool(is_real.all()):
        return x, Place(before, new), None
    order = is_real.int().argsort(dim=1, stable=True)
    return x.gather(1, order[..., None].expand_as(x)), Place(before, new, (~is_real).sum(1)), order


class SynfireForCausalLM(SynfirePreTrainedModel, GenerationMixin):
    """The language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embedding.weight"}

    def __init__(self, config: SynfireConfig) -> None:
        super().__init__(config)
        self.model = SynfireModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(  # noqa: PLR0913 - what transformers and its users pass
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: SynfireCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits `[B, T, V]` in at least float32; with labels (not shifted) the mean loss too.

        Args:
            input_ids: `[B, T]`, the tokens after those in the cache.
            attention_mask: `[B, all tokens so far]`, 0 at padding, wherever that lies.
            past_key_values: what an earlier call returned.
            inputs_embeds: `[B, T, D]` in place of tokens.
            labels: `[B, T]`, the tokens themselves, -100 where nothing is learned.
            use_cache: whether to return a cache, by default outside training.
            output_hidden_states: whether to return the residual stream before each block.
            return_dict: False returns a tuple.
            logits_to_keep: how many of the last tokens, or which; 0 is all.

        Raises:
            ValueError: not one of tokens and embeddings; another kind of cache; a mask that does
                not fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids or inputs_embeds must be given: got both or neither.")
        if past_key_values is not None and not isinstance(past_key_values, SynfireCache):
            raise ValueError(
                f"past_key_values ({type(past_key_values).__name__}) must be a SynfireCache: leave "
                "it out, and use the one that the model returns."
            )
        if use_cache is None:
            use_cache = not self.training
        cache = past_key_values
        if use_cache and cache is None:
            cache = SynfireCache(self.config)
        if inputs_embeds is None:
            inputs_embeds = self.model.embedding(input_ids)
        streams = self.model(inputs_embeds, attention_mask, cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = widened(self.lm_head(streams[-1][:, kept]))
        out = CausalLMOutputWithPast(
            loss=None if labels is None else _loss(logits, labels),
            logits=logits,
            past_key_values=cache if use_cache else None,
            hidden_states=streams if output_hidden_states else None,
        )
        return out.to_tuple() if return_dict is False else out

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *_: Any, **__: Any
    ) -> None:
        """`generate` starts from this model's own cache."""
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation ({kind}) must be left out: the model has its own cache."
            )
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = SynfireCache(self.config)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of the next tokens."""
    targets = labels[:, 1:].to(logits.device)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100)
