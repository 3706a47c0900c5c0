"""`spike_raster.npz`: the spike counts of one sentence at one site, for the report's raster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from launch.report_inputs import FILES
from models.model import Model
from models.sequence import SequenceContext
from models.spiking.capture import CountCapture
from models.spiking.neurons import Spikes


@dataclass(frozen=True, slots=True)
class Sentence:
    """Token ids of a text and how to read one id back as text."""

    ids: Sequence[int]
    decode: Callable[[list[int]], str]


@torch.no_grad()
def write_raster(
    model: Model, sentence: Sentence, run_dir: Path, *, k: float, site: str | None = None
) -> Path:
    """Run a sentence through a spiking model and write its counts; return the file.

    `site` is `<layer>/<site>`, by default the FFN input of the middle layer.

    Raises:
        ValueError: no token, or a model that does not spike at the site.
    """
    if not sentence.ids:
        raise ValueError("sentence (no tokens) must have at least one token. Use another text.")
    site = f"{len(model.blocks) // 2}/ffn_in" if site is None else site
    device = next(model.parameters()).device
    tokens = torch.tensor([list(sentence.ids)], dtype=torch.int64, device=device)
    capture = CountCapture([site])
    context = SequenceContext.one_document_per_row(*tokens.shape, device=device)
    model.hidden_states(tokens, context, spikes=Spikes(k, recorder=capture))
    if site not in capture.counts:
        raise ValueError(
            f"site ({site}) must be a place where the model spikes: got none there. Build the "
            f"model with spiking=adaptive and name a site as <layer>/ffn_in."
        )
    path = run_dir / FILES["raster"]
    words = np.array([sentence.decode([token]) for token in sentence.ids], dtype=np.str_)
    counts = capture.counts[site].numpy().astype(np.int32)
    np.savez_compressed(path, tokens=words, counts=counts, site=np.array(site), k=np.array(k))
    return path
