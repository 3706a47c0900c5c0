"""What sample text teaches new mixers (`L`, `X+Y`), layer by layer on the source's stream.

Calibrates norms, centres key biases, and optionally aligns: trains only new parameters so that the
mixer's output matches the softmax mixer's on the source's own hidden states. Holds one layer at a
time. Shape letters: T tokens, N query heads, G key-value heads, H head dim.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from models.block import Block
from models.config import ModelConfig
from models.conversion.block_stream import BlockStream, SampleRows, advance
from models.conversion.branch_norms import fit_branch_norms
from models.conversion.convert import plan_conversion
from models.conversion.huggingface import TensorSource
from models.conversion.new_parameters import ConversionOptions, KeyBias, NormInit
from models.conversion.source_checks import becomes_new, linear_key_bias
from models.conversion.source_config import read_config
from models.conversion.weight_map import HEAD_NORM, mixer_name
from models.layer_pattern import MixerKind
from models.layouts import is_new_parameter
from models.mixer import Mixer
from models.mixer_config import BranchNorm, BranchProjections
from models.sequence import SequenceContext

logger = logging.getLogger(__name__)

_TUNED_WIDTH = 128
"""Inputs up to which a matrix takes the whole learning rate: Adam's steps add up over them."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much is done and how much there is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AlignmentOptions:
    """How gates and head norms are aligned; the learning rate falls linearly to zero.

    `learning_rate` is that of the small parameters; the wide `gate_down` takes less of it.
    """

    learning_rate: float = 3e-2
    rows_per_step: int = 4
    epochs: int = 1


@dataclass(slots=True)
class Fitted:
    """Values by target name with a note each, and the errors of aligned layers."""

    values: dict[str, tuple[Tensor, str]] = field(default_factory=dict)
    alignment: list[dict[str, Any]] = field(default_factory=list)


def fit_new_parameters(  # noqa: PLR0913 - source, target, options and the two texts
    source: TensorSource,
    target: ModelConfig,
    options: ConversionOptions,
    sample: SampleRows,
    *,
    alignment: tuple[AlignmentOptions, SampleRows] | None = None,
    progress: Progress | None = None,
) -> Fitted:
    """Walk the source's blocks once and fit the layers that get new mixers.

    Args:
        source: the checkpoint.
        target: the model to convert to.
        options: what to fit (`norm_init`, `key_bias`).
        sample: text for statistics, and for the errors before and after alignment.
        alignment: options and text to align on; None: no alignment.
        progress: told after each layer.

    Raises:
        ValueError: `key_bias=centre` for a model that cannot be centred.
    """
    check_key_bias(target, options)
    config = read_config(source.config)
    names = {t.name: t.load for t in plan_conversion(source, config)}
    stream = BlockStream(config, lambda name: names[name]())
    fitted = Fitted()
    walks = [_Walk(stream, sample)]
    if alignment is not None:
        walks.append(_Walk(stream, alignment[1]))
    sinks = _planned_stream(source, target, options, fitted).sinks()
    for layer, is_new in enumerate(becomes_new(config, target)):
        block = stream.block(layer)
        if is_new:
            _measure(block, walks[0], layer, options, target, fitted)
            student = _student(source, target, options, fitted, layer, sinks)
            if len(student.mixer.branches) > 1 and options.norm_init is NormInit.calibrated:
                _merge(block, student, walks[0], layer, target, fitted)
                student = _student(source, target, options, fitted, layer, sinks)
            if alignment is not None:
                _align(block, student, walks, layer, alignment[0], fitted)
        for walk in walks:
            advance(block, walk.hidden, walk.sequences)
        if sinks is not None:
            with torch.no_grad():
                sinks, _ = (
                    _planned_stream(source, target, options, fitted).block(layer).begin(sinks)
                )
        if progress is not None:
            progress("calibrate", layer + 1, config.num_hidden_layers)
    return fitted


def check_key_bias(target: ModelConfig, options: ConversionOptions) -> None:
    """Refuse what cannot be centred; warn where the option has no effect.

    Raises:
        ValueError: `centre` without a key bias, or with a norm behind it; a bias that another
            branch reads too.
    """
    is_shared = target.branches.projections is BranchProjections.shared and any(
        len(mixers) > 1 and MixerKind.linear in mixers for mixers in target.layers.mixers
    )
    if options.key_bias is not KeyBias.keep and target.qkv_bias and is_shared:
        raise ValueError(
            f"linear.key_bias ({options.key_bias.value}) must be keep where parallel branches "
            "share projections: the softmax branch reads the same bias. Set "
            "model.branches.projections=separate, or keep."
        )
    if options.key_bias is KeyBias.centre and (not target.qkv_bias or target.qk_norm):
        missing = "a k/v/q bias" if not target.qkv_bias else "no q/k norm behind it"
        raise ValueError(f"linear.key_bias (centre) must have a model with {missing}. Use keep.")
    if options.key_bias is KeyBias.zero and not target.qkv_bias:
        logger.warning("linear.key_bias (zero) has no effect: the model has no key bias.")


class _Walk:
    """One text on its way through the source's blocks."""

    def __init__(self, stream: BlockStream, rows: SampleRows) -> None:
        self.sequences = rows.sequences()
        self.hidden = stream.embed(rows)
        self.num_tokens = rows.num_tokens

    def inputs(self, block: Block) -> Iterator[tuple[Tensor, SequenceContext]]:
        """What the block's mixer reads, row by row."""
        assert block.mixer_norm is not None
        for hidden, sequence in zip(self.hidden, self.sequences, strict=True):
            yield block.mixer_norm(hidden), sequence


@torch.no_grad()
def _measure(  # noqa: PLR0913 - one layer with its text, what to fit and where it goes
    block: Block,
    walk: _Walk,
    layer: int,
    options: ConversionOptions,
    target: ModelConfig,
    fitted: Fitted,
) -> None:
    """RMS of the softmax mixer's head outputs per channel [H]; mean of W_k x [G * H]."""
    mixer = block.mixer
    assert mixer is not None
    (branch,) = mixer.branches
    k_proj = branch.projections.k_proj
    mixers = target.layers.mixers[layer]
    # Where branches meet before the output projection, head norms are fitted together.
    meets_later = len(mixers) == 1 or target.branches.norm is BranchNorm.after_output
    needs_rms = options.norm_init is NormInit.calibrated and (
        MixerKind.linear in mixers and meets_later
    )
    key_bias = linear_key_bias(target, layer)
    is_centred = options.key_bias is KeyBias.centre and key_bias is not None
    squares: Tensor | float = 0.0
    keys: Tensor | float = 0.0
    for x, sequence in walk.inputs(block):
        if needs_rms:
            (heads,) = mixer.attend(x, sequence)
            squares = squares + heads.square().mean(dim=2).sum(dim=(0, 1))
        if is_centred:
            keys = keys + (k_proj(x) - k_proj.bias).sum(dim=(0, 1))
    num_tokens = walk.num_tokens
    if needs_rms:
        rms = torch.as_tensor(squares / num_tokens).sqrt()
        note = f"RMS of the source's attention output per channel on {num_tokens} tokens"
        home = f"{MixerKind.linear.name}." if len(mixers) > 1 else ""
        fitted.values[mixer_name(layer, home + HEAD_NORM)] = (rms, note)
    if is_centred and key_bias is not None:
        note = f"minus the mean of W_k x on {num_tokens} tokens (key_bias=centre)"
        fitted.values[key_bias] = (-torch.as_tensor(keys / num_tokens), note)


def _merge(  # noqa: PLR0913 - one layer with both mixers, its text and where it goes
    block: Block,
    student: _Student,
    walk: _Walk,
    layer: int,
    target: ModelConfig,
    fitted: Fitted,
) -> None:
    """Norms with which parallel branches come closest to the source's mixer."""
    assert block.mixer is not None
    note = f"least squares against the source's attention output on {walk.num_tokens} tokens"
    weights = fit_branch_norms(block.mixer, student.mixer, student, walk.inputs(block), target)
    for name, weight in weights.items():
        fitted.values[mixer_name(layer, name)] = (weight, note)


class _Student:
    """The new mixer of one layer with the sinks that it reads, `[1, S, D]`."""

    def __init__(self, mixer: Mixer, sinks: Tensor | None) -> None:
        self.mixer, self._sinks = mixer, sinks

    def __call__(self, x: Tensor, sequence: SequenceContext) -> Tensor:
        """What it makes of tokens `[B, T, D]`."""
        out = self.mixer(x, sequence, sinks=self._sinks)
        tokens: Tensor = out if self._sinks is None else out[0]
        return tokens


def _planned_stream(
    source: TensorSource, target: ModelConfig, options: ConversionOptions, fitted: Fitted
) -> BlockStream:
    """The target as conversion would write it now."""
    plan = {t.name: t.load for t in plan_conversion(source, target, options, fitted=fitted.values)}
    return BlockStream(target, lambda name: plan[name]())


@torch.no_grad()
def _after(block: Block, sinks: Tensor) -> Tensor:
    """The stream of sinks after a block of the target; no token changes it."""
    return block.begin(sinks)[0]


@torch.no_grad()
def _student(  # noqa: PLR0913 - one layer of a conversion, and the sinks that reach it
    source: TensorSource,
    target: ModelConfig,
    options: ConversionOptions,
    fitted: Fitted,
    layer: int,
    sinks: Tensor | None,
) -> _Student:
    """The mixer of one layer as conversion would start it; new parameters are trainable."""
    block = _planned_stream(source, target, options, fitted).block(layer)
    mixer = block.mixer
    assert mixer is not None
    assert block.mixer_norm is not None
    for name, parameter in mixer.named_parameters():
        if is_new_parameter(mixer_name(layer, name)):
            parameter.data = parameter.data.clone()
            parameter.requires_grad_(True)
    return _Student(mixer, None if sinks is None else block.mixer_norm(sinks))


def _align(  # noqa: PLR0913 - one layer with its teacher, texts and options
    teacher: Block,
    student: _Student,
    walks: list[_Walk],
    layer: int,
    options: AlignmentOptions,
    fitted: Fitted,
) -> None:
    """Train one layer; keep the start when training did not help on the other text."""
    before = _relative_error(teacher, student, walks[0])
    _train(teacher, student, walks[1], options)
    after = _relative_error(teacher, student, walks[0])
    num_tokens = walks[1].num_tokens * options.epochs
    is_better = after < before
    fitted.alignment.append(
        {"layer": layer, "tokens": num_tokens, "before": before, "after": after, "kept": is_better}
    )
    if not is_better:
        logger.warning("alignment of layer %d kept its start: %.4g to %.4g", layer, before, after)
        return
    for name, parameter in student.mixer.named_parameters():
        if parameter.requires_grad:
            note = f"aligned on {num_tokens} tokens"
            fitted.values[mixer_name(layer, name)] = (parameter.detach().clone(), note)


def _train(teacher: Block, student: _Student, walk: _Walk, options: AlignmentOptions) -> None:
    """AdamW on the squared error over the teacher's power."""
    optimizer = torch.optim.AdamW(
        [
            {"params": [p], "lr": options.learning_rate * min(1.0, _TUNED_WIDTH / p.shape[-1])}
            for p in student.mixer.parameters()
            if p.requires_grad
        ],
        weight_decay=0.0,
    )
    num_rows = len(walk.hidden)
    num_steps = options.epochs * -(-num_rows // options.rows_per_step)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=num_steps)
    for _ in range(options.epochs):
        batch = _errors(teacher, student, walk)
        for row, (error, power) in enumerate(batch, start=1):
            torch.autograd.backward(error / power / options.rows_per_step)
            if row % options.rows_per_step == 0 or row == num_rows:
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()


def _errors(teacher: Block, student: _Student, walk: _Walk) -> Iterator[tuple[Tensor, Tensor]]:
    """Per row: summed squared error of the mixer's output, and the teacher's summed square."""
    assert teacher.mixer is not None
    for x, sequence in walk.inputs(teacher):
        with torch.no_grad():
            wanted = teacher.mixer(x, sequence)
        power = wanted.square().sum().clamp_min(torch.finfo(wanted.dtype).tiny)
        yield (student(x, sequence) - wanted).square().sum(), power


@torch.no_grad()
def _relative_error(teacher: Block, student: _Student, walk: _Walk) -> float:
    """Root of squared error over the teacher's square, all rows together."""
    errors = list(_errors(teacher, student, walk))
    return float((sum(e for e, _ in errors) / sum(p for _, p in errors)) ** 0.5)
