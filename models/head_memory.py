"""Bytes at the two ends of a model: the embedding, and the final norm with head and loss.

As `models.activation_memory` for the blocks between. Shape letters: T tokens, D hidden, V rows of
the vocabulary on this rank, C tokens of a chunk of the loss.
"""

from __future__ import annotations

from dataclasses import replace

from models.memory_tape import Footprint, Tape
from models.operation_memory import PLAIN_KERNELS, Workload, enter, norm


def embedding_footprint(work: Workload, vocab_rows: int) -> Footprint:
    """Of the embedding, from nothing to the streams; it keeps only the tokens' ids.

    Where the vocabulary is cut, the rows found and those with other ranks' tokens masked exist
    beside the sum over ranks.
    """
    whole = work.tokens * work.model.hidden_size * work.narrow
    aside = 2 * whole if work.tp > 1 else 0
    gradient = (vocab_rows + work.model.sinks.num_tokens) * work.model.hidden_size * work.narrow
    makes = work.stream + (work.of_sinks().stream if work.model.uses_sinks else 0)
    return Footprint(
        kept=0,
        forward_peak=makes + aside,
        backward_peak=makes + aside + gradient,
        later_backward_peak=makes + aside + gradient,
        weight_gradients=gradient,
        traffic=2 * makes,
        makes=makes,
    )


def head_footprint(work: Workload, vocab_rows: int, *, chunk_tokens: int) -> Footprint:
    """Of final norm, head and chunked loss, from the residual stream to a number.

    One chunk's logits exist at a time, and the chunk before is let go only when the next one is
    there. The gradient of the head's weight adds up in the wide dtype.
    """
    tape = Tape(work.stream)
    hidden = enter(tape, norm(tape, tape.source, work.stream_tokens, work, "final_norm"), work)
    weight = vocab_rows * work.model.hidden_size
    chunk = min(chunk_tokens, work.tokens) * vocab_rows
    before = 1 if work.tokens > chunk_tokens else 0
    narrow, wide = work.narrow, work.wide
    if work.is_narrow:
        # Narrow and wide logits; or a product as large as the weight and narrow logits, and on a
        # processor the product once more in the wide dtype to be added.
        making = chunk * (wide + narrow)
        widened = weight * wide if work.kernels == PLAIN_KERNELS else 0
        needed = max(making + before * chunk * narrow - weight * narrow, chunk * narrow + widened)
        scratch, backward = making + before * chunk * wide, weight * wide + needed
    else:
        scratch = backward = (1 + before) * chunk * wide
    loss = tape.op(
        hidden,
        makes=0,
        saves=[hidden, work.tokens * wide],
        scratch=scratch + 2 * work.tokens * wide,
        backward_scratch=backward,
        weights=weight * narrow,
    )
    # Logits are written, then read for their maximum, written as exponentials, read for their sum.
    passes = work.tokens * vocab_rows * (4 * wide + (2 * narrow if work.is_narrow else 0))
    footprint = tape.footprint(loss)
    return replace(footprint, traffic=footprint.traffic + passes)
