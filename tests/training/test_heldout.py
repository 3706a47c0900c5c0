"""What a run evaluates on the side: the folders of a mixture, each by its own name."""

from __future__ import annotations

import shutil
from pathlib import Path

from data.prepare_corpus import prepare
from tests.training.tiny_run import tiny_run, write_corpus
from training.heldout import distinct_names
from training.metrics import read_rows
from training.run import run


def test_folders_of_a_mixture_are_evaluated_apart_even_under_one_name(
    data: Path, tmp_path: Path
) -> None:
    paths = [tmp_path / name / "prepared" for name in ("code", "web")]
    shutil.copytree(data, paths[0])
    shutil.copytree(prepare_other(data, tmp_path), paths[1])
    mixture = {str(path): 1.0 for path in paths}
    config = tiny_run(
        data, tmp_path / "run", data={"path": None, "mixture": mixture},
        evaluation={"interval_steps": 1, "rows": 3}, training={"max_steps": 1},
    )  # fmt: skip
    run(config)
    (row,) = read_rows(tmp_path / "run" / "eval.jsonl")
    parts = {key: value for key, value in row.items() if key.startswith("perplexity/")}
    assert set(parts) == {"perplexity/code/prepared", "perplexity/web/prepared"}
    assert min(parts.values()) < row["perplexity"] < max(parts.values())
    assert distinct_names([Path("a/x"), Path("b/y")]).keys() == {"x", "y"}
    deep = [Path("/one/a/x"), Path("/two/a/x"), Path("/two/b/x")]
    assert list(distinct_names(deep)) == ["one/a/x", "two/a/x", "two/b/x"]


def prepare_other(data: Path, tmp_path: Path) -> Path:
    """Other text under the tokenizer of `data`."""
    source = write_corpus(tmp_path / "text", seed=5)
    out = tmp_path / "other"
    prepare(str(source), out, tokenizer=data / "tokenizer", heldout_fraction=0.2)
    return out
