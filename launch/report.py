"""`python -m launch.report`: one self-contained HTML page from a run folder."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import TypeAdapter

from launch.checkpoints import open_model
from launch.compose import command
from launch.report_page import render_report
from launch.spike_raster import Sentence, write_raster
from models.config import NeuronKind, SpikingConfig
from parallel.checkpoint_folders import CheckpointError, newest_complete, read_manifest
from training.config import STRICT

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """Which run, where the page goes, and other places for what is not in the run folder.

    `summary` is a quickstart's summary.json, `certificate` a conversion's folder or file, `raster`
    a spike_raster.npz. Without a raster one is made of `sentence`, if the run spikes.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    run_dir: str
    out: str | None = None
    summary: str | None = None
    certificate: str | None = None
    raster: str | None = None
    sentence: str = "def mean(values):\n    return sum(values) / len(values)\n"


@command("report", ReportConfig)
def main(config: ReportConfig) -> None:
    """Render loss, learning rate, throughput, spikes, comparison, energy and the certificate.

    What a run folder lacks is named on the page, with the command that makes it.
    """
    named = {
        "summary": config.summary, "certificate": config.certificate, "raster": config.raster
    }  # fmt: skip
    extra = {name: Path(path) for name, path in named.items() if path is not None}
    run_dir = Path(config.run_dir)
    if "raster" not in extra:
        make_raster(run_dir, config.sentence)
    out = None if config.out is None else Path(config.out)
    page = render_report(run_dir, out=out, extra=extra)
    logger.info("wrote %s (%.1f kB)", page, page.stat().st_size / 1000)


def make_raster(run_dir: Path, sentence: str) -> None:
    """Write the raster of a sentence through the run's newest checkpoint, if the run spikes."""
    try:
        newest = newest_complete(run_dir)
    except CheckpointError as error:
        logger.warning("no raster: %s", error)
        return
    if newest is None:
        return
    trained = TypeAdapter(SpikingConfig).validate_python(read_manifest(newest)["spiking"])
    if trained.neuron is NeuronKind.off:
        return
    opened = open_model(newest, spiking=trained)
    if opened.tokenizer is None:
        return
    words = Sentence(opened.tokenizer.encode(sentence), opened.tokenizer.decode)
    write_raster(opened.model, words, run_dir, k=trained.k)


if __name__ == "__main__":
    main()
