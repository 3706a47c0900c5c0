from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.indexed import ShardWriter, TokenShard, token_dtype

DOCUMENTS = [[1, 2, 3], [4], [5, 6, 7, 8]]


def shard(prefix: Path, *, vocab_size: int = 100) -> Path:
    writer = ShardWriter(prefix, vocab_size=vocab_size)
    for document in DOCUMENTS:
        writer.add(np.array(document, dtype=np.int32))
    assert (writer.num_documents, writer.num_tokens) == (3, 8)
    writer.close()
    return prefix


@pytest.mark.parametrize(("vocab_size", "dtype"), [(100, np.uint16), (151_936, np.int32)])
def test_what_is_written_is_read(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    assert token_dtype(vocab_size) is dtype
    found = TokenShard(shard(tmp_path / "train", vocab_size=vocab_size))
    assert found.tokens.dtype == dtype
    assert found.tokens.tolist() == [token for document in DOCUMENTS for token in document]
    assert found.lengths.tolist() == [3, 1, 4]
    assert found.first_token(np.array([2, 0, 1])).tolist() == [4, 0, 3]
    assert (found.num_documents, found.num_tokens) == (3, 8)


def test_megatrons_own_reader_reads_it(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(shard(tmp_path / "train")))
    assert [dataset[index].tolist() for index in range(len(dataset))] == DOCUMENTS
    assert dataset.document_indices.tolist() == [0, 1, 2, 3]


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def test_damaged_shards_are_refused(tmp_path: Path) -> None:
    prefix = shard(tmp_path / "train")
    tokens, index = tmp_path / "train.bin", tmp_path / "train.idx"
    whole_tokens, whole_index = tokens.read_bytes(), index.read_bytes()
    tokens.write_bytes(whole_tokens[:-2])
    with pytest.raises(ValueError, match=r"train\.bin \(14 bytes\) must have .*got 16.*truncated"):
        TokenShard(prefix)
    tokens.write_bytes(whole_tokens)
    index.write_bytes(whole_index[:-3])
    with pytest.raises(ValueError, match=r"train\.idx \(\d+ bytes\) must have \d+: it is trunc"):
        TokenShard(prefix)
    for damaged in (whole_index[:20], b"x" * len(whole_index)):
        index.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"train\.idx must be a token index: its header"):
            TokenShard(prefix)
    index.write_bytes(whole_index[:9] + b"\x07" + whole_index[10:])
    with pytest.raises(ValueError, match="got version 7, type 8"):
        TokenShard(prefix)
    index.unlink()
    with pytest.raises(ValueError, match=r"train\.idx must exist"):
        TokenShard(prefix)


@pytest.mark.parametrize("token", [100, 70_000, -1])
def test_a_token_outside_the_vocabulary_is_refused(tmp_path: Path, token: int) -> None:
    writer = ShardWriter(tmp_path / "train", vocab_size=100)
    with pytest.raises(ValueError, match=r"token id \(.*\) must be below vocab_size: got 100"):
        writer.add(np.array([1, token], dtype=np.int32))
    writer.abandon()


@pytest.mark.slow
def test_using_the_library_says_nothing_and_changes_nothing(tmp_path: Path) -> None:
    script = (
        "import logging, os, sys, warnings\n"
        "logging.basicConfig(level=logging.INFO, stream=sys.stdout)\n"
        "import torch, numpy\n"
        "before = list(warnings.filters), logging.root.level, list(logging.root.handlers)\n"
        "from tests.data.test_indexed import shard\n"
        "from data.indexed import TokenShard\n"
        "from pathlib import Path\n"
        "TokenShard(shard(Path(sys.argv[1])))\n"
        "assert 'megatron.core' in sys.modules\n"
        "after = list(warnings.filters), logging.root.level, list(logging.root.handlers)\n"
        "assert logging.getLogger('megatron').level == logging.NOTSET\n"
        "assert [f for f in after[0] if f not in before[0]] == [], after[0]\n"
        "assert after[1:] == before[1:]\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "train")],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_importing_the_package_does_not_load_the_library() -> None:
    script = "import sys, data.loader, data.prepare_corpus; assert 'megatron' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_the_level_of_the_librarys_logger_is_restored(tmp_path: Path) -> None:
    logger = logging.getLogger("megatron")
    logger.setLevel(logging.DEBUG)
    try:
        TokenShard(shard(tmp_path / "train"))
        assert logger.level == logging.DEBUG
    finally:
        logger.setLevel(logging.NOTSET)
