"""A folder that one rank alone cannot read, while a run starts: the same clear error on all."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from parallel.mesh import RankError
from tests.support.distributed import run_ranks
from tests.training.tiny_run import tiny_run
from training.config import RunConfig
from training.run import run

READERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "data": ("training.stage_data.read_manifest", {}, "opening the prepared data"),
    "held-out rows": (
        "training.heldout.heldout_rows", {"evaluation": {"interval_steps": 3}},
        "reading held-out rows",
    ),
    "hashes": ("parallel.checkpoint_folders.file_facts", {"init": {}}, "checking "),
    "weights": (
        "parallel.checkpoint.read_tensors", {"init": {}}, "loading init.checkpoint (",
    ),
    "teacher's kind": (
        "training.weight_source._synfire", {"training": {}}, "opening training.teacher (",
    ),
    "teacher": (
        "parallel.checkpoint.read_tensors", {"training": {}}, "loading training.teacher (",
    ),
}  # fmt: skip
"""What fails, what the run needs of it, what was being done."""


def config_of(data: Path, folder: Path, name: str) -> RunConfig:
    """A run that starts from, or learns from, the finished one in `folder` where a case says so."""
    source, changes = str(folder / "source"), dict(READERS[name][1])
    if "init" in changes:
        changes["init"] = {"checkpoint": source}
    if "training" in changes:
        changes |= {"training": {"teacher": source}, "distill": {"kl": 1.0}}
    return tiny_run(data, folder / name, **changes)


def messages_of(rank: int, world_size: int, configs: dict[str, RunConfig]) -> dict[str, str]:
    """What each run says on this rank, when reading fails on rank 1."""

    def broken(*_arguments: Any, **_named: Any) -> Any:
        raise OSError(5, "Input/output error")

    messages: dict[str, str] = {}
    for name, config in configs.items():
        broken_here = patch(READERS[name][0], broken) if rank == 1 else nullcontext()
        with broken_here, pytest.raises(RankError) as caught:
            run(config)
        messages[name] = str(caught.value)
    return messages


def test_every_rank_ends_with_the_reason(data: Path, tmp_path: Path) -> None:
    run(tiny_run(data, tmp_path / "source", training={"max_steps": 1}))
    configs = {name: config_of(data, tmp_path, name) for name in READERS}
    first, second = run_ranks(messages_of, 2, configs, tmp_path=tmp_path)
    assert first == second
    for name, (_, _, action) in READERS.items():
        assert first[name].startswith(action), first[name]
        assert first[name].endswith(" failed on rank 1: OSError: [Errno 5] Input/output error")
        assert not (tmp_path / name).exists()
