"""The prepared data behind each stage: found, checked against the model, opened once.

Owns which folders a stage reads and what must agree between them. Order, packing and batches are
`data.loader`'s.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path

from data.config import DataConfig
from data.loader import Batch, StageData
from data.prepare_corpus import ensure_prepared
from data.prepared import Manifest, check_contents, open_tokenizer, read_manifest
from data.tokenizer import Tokenizer
from parallel.mesh import Mesh
from training.config import RunConfig
from training.stages import Stage, StagePlan


@dataclass(frozen=True, slots=True)
class RunData:
    """All stages' data, opened. `sources` maps stage names to prepared folders."""

    sources: Mapping[str, tuple[Path, ...]]
    stages: Mapping[str, StageData]
    tokenizer: Tokenizer
    prefetch_steps: Mapping[str, int]

    def stream(
        self, stage: Stage, step: int, *, rank: int, size: int
    ) -> Generator[Batch, None, None]:
        """This rank's batches from the step after `step` finished ones, without end."""
        return self.stages[stage.name].stream(
            step - stage.first_step,
            rank=rank,
            size=size,
            prefetch=self.prefetch_steps[stage.name],
        )

    def sample_ids(self, stage: Stage, step: int) -> tuple[object, ...]:
        """Ids of all rows, of all ranks, of the step after `step` finished ones."""
        return tuple(self.stages[stage.name].sample_ids(step - stage.first_step))

    def fingerprints(self) -> dict[str, str]:
        """Hash of the content that each stage reads."""
        return {name: data.fingerprint for name, data in self.stages.items()}


def open_data(plan: StagePlan, config: RunConfig, mesh: Mesh) -> RunData:
    """Prepare what is prepared on first use, check every folder, open every stage. Collective.

    Raises:
        ValueError: a missing or damaged folder, a vocabulary larger than the model's, two
            tokenizers.
    """
    return mesh.agree("opening the prepared data", lambda: _open_data(plan, config, mesh))


def _open_data(plan: StagePlan, config: RunConfig, mesh: Mesh) -> RunData:
    sources: dict[str, dict[Path, float]] = {}
    for stage in plan.stages:
        _check_corpus_vocabulary(stage.data, config.model.vocab_size)
        sources[stage.name] = prepared_folders(stage.data)
    paths = [path for stage_sources in sources.values() for path in stage_sources]
    manifests = {path: read_manifest(path) for path in paths}
    _check_one_tokenizer(manifests)
    for path, manifest in manifests.items():
        check_vocabulary(path, manifest.vocab_size, config.model.vocab_size)
        if mesh.is_main:
            check_contents(path, manifest)
    return RunData(
        sources={name: tuple(paths) for name, paths in sources.items()},
        stages={
            stage.name: StageData(
                {str(path): weight for path, weight in sources[stage.name].items()},
                seed=config.seed,
                stage=stage.name,
                sequence_length=stage.config.sequence_length,
                rows_per_step=stage.config.rows_per_step,
            )
            for stage in plan.stages
        },
        tokenizer=open_tokenizer(paths[0]),
        prefetch_steps={stage.name: stage.data.prefetch_steps for stage in plan.stages},
    )


def prepared_folders(data: DataConfig) -> dict[Path, float]:
    """The prepared folders of `data` and their weights; prepares the corpus on first use."""
    if data.mixture:
        return {Path(path): weight for path, weight in data.mixture.items()}
    if data.path is not None:
        return {Path(data.path): 1.0}
    return {ensure_prepared(data.corpus): 1.0}


def _check_one_tokenizer(manifests: Mapping[Path, Manifest]) -> None:
    """All stages, not only all folders of one mixture, must share their token ids."""
    first_path, first = next(iter(manifests.items()))
    for path, manifest in manifests.items():
        if manifest.tokenizer_sha256 != first.tokenizer_sha256:
            raise ValueError(
                f"data ({path}: tokenizer {manifest.tokenizer_sha256[:12]}) must have one "
                f"tokenizer in all stages of a run: got {first.tokenizer_sha256[:12]} in "
                f"{first_path}. Prepare both with the same tokenizer=."
            )


def _check_corpus_vocabulary(data: DataConfig, model_vocab_size: int) -> None:
    """Compare before the corpus is prepared, which takes time."""
    uses_corpus = data.path is None and not data.mixture
    if uses_corpus and data.corpus.vocab_size > model_vocab_size:
        raise ValueError(
            f"data.corpus.vocab_size ({data.corpus.vocab_size}) must not be above "
            f"model.vocab_size: got {model_vocab_size}. Lower it, or choose another model=."
        )


def check_vocabulary(path: Path, vocab_size: int, model_vocab_size: int) -> None:
    """Refuse data with token ids that the model has no embedding for.

    Raises:
        ValueError: both numbers.
    """
    if vocab_size > model_vocab_size:
        raise ValueError(
            f"vocab_size of {path} ({vocab_size}) must not be above model.vocab_size: got "
            f"{model_vocab_size}. Prepare the data with this model's tokenizer=, or choose "
            "another model=."
        )
