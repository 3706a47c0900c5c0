"""Held-out perplexity inside the loop: the same rows each time, shared out over ranks.

The measure is `training.evaluate`'s; losses come from the engine, so sharded parameters work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.loader import heldout_rows
from models.config import SpikingConfig
from models.spiking.neurons import Spikes
from models.spiking.schedule import spikes_at
from parallel.engine_protocol import Engine
from parallel.mesh import Mesh
from training.config import RunConfig
from training.evaluate import Perplexity, PositionBuckets, summed_losses
from training.microbatch import Rows, rank_share
from training.stage_data import RunData
from training.stages import Stage, StagePlan


@dataclass(frozen=True, slots=True)
class HeldOut:
    """This rank's held-out rows of every stage by prepared folder, and how to score them."""

    engine: Engine
    spiking: SpikingConfig
    interval_steps: int
    microbatch_rows: int
    window_tokens: int | None
    rows: Mapping[str, Mapping[str, Rows]]

    @classmethod
    def open(
        cls, config: RunConfig, plan: StagePlan, data: RunData, engine: Engine, mesh: Mesh
    ) -> HeldOut:
        """Read the rows now, so that a folder without held-out text is an error at the start.

        Collective.

        Raises:
            ValueError: a prepared folder without held-out text.
        """
        wanted = plan.stages if config.evaluation.interval_steps > 0 else ()
        rows = mesh.agree(
            "reading held-out rows",
            lambda: {s.name: _stage_rows(s, data, mesh, config.evaluation.rows) for s in wanted},
        )
        return cls(
            engine=engine,
            spiking=config.spiking,
            interval_steps=config.evaluation.interval_steps,
            microbatch_rows=config.training.microbatch_rows,
            window_tokens=config.model.visible_window_tokens,
            rows=rows,
        )

    def is_due(self, step: int, *, total_steps: int) -> bool:
        """Whether to evaluate after this step: at the interval and at the end."""
        interval = self.interval_steps
        return interval > 0 and (step % interval == 0 or step == total_steps)

    def evaluate(self, stage: Stage, step: int) -> dict[str, Any]:
        """The `eval.jsonl` row after `step` finished steps, spiking as in the last one. Collective.

        `perplexity` is over all tokens of all folders; with several, `perplexity/<folder>` each.
        """
        spikes = trained_spikes(self.spiking, step)
        buckets = PositionBuckets(stage.config.sequence_length, self.window_tokens)
        sums = {
            name: summed_losses(
                rows,
                lambda part: self.engine.token_losses(part, spikes=spikes),
                buckets,
                microbatch_rows=self.microbatch_rows,
            )
            for name, rows in self.rows[stage.name].items()
        }
        total = self.engine.sum_over_ranks(torch.stack(list(sums.values())))
        overall = Perplexity.from_sums(buckets, total.sum(dim=0))
        row: dict[str, Any] = {
            "step": step,
            "stage": stage.name,
            "loss": overall.loss,
            "perplexity": overall.perplexity,
            "perplexity_beyond_window": overall.beyond_window,
            "num_tokens": overall.num_tokens,
            "spiking": spikes is not None,
        }
        row.update({f"position/{name}": value for name, value in overall.by_position.items()})
        if len(sums) > 1:
            for name, part in zip(sums, total, strict=True):
                row[f"perplexity/{name}"] = Perplexity.from_sums(buckets, part).perplexity
        return row


def trained_spikes(spiking: SpikingConfig, step: int) -> Spikes | None:
    """How the last of `step` finished steps spiked."""
    return spikes_at(spiking, max(0, step - 1))


def _stage_rows(stage: Stage, data: RunData, mesh: Mesh, rows: int) -> dict[str, Rows]:
    return {
        name: rank_share(
            heldout_rows(path, sequence_length=stage.config.sequence_length, rows=rows),
            rank=mesh.dp_rank,
            size=mesh.dp_size,
        )
        for name, path in distinct_names(data.sources[stage.name]).items()
    }


def distinct_names(folders: Sequence[Path]) -> dict[str, Path]:
    """Folders by their last parts, as many as tell all of them apart."""
    parts = [folder.resolve().parts for folder in folders]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(set(parts)):
        depth += 1
    return {"/".join(part[-depth:]): folder for part, folder in zip(parts, folders, strict=True)}
