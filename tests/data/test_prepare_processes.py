"""Preparing as processes see it: two at once, one that is killed, a full disk."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from data.prepared import check_files, read_manifest
from data.tokenizer_training import train_sentencepiece
from tests.data.test_prepare_corpus import VOCAB, folder_of, texts

CHILD = """
import logging, sys
from pathlib import Path
logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
from data.prepare_corpus import prepare
from data.tokenizer import SentencePieceTokenizer

role, source, out = sys.argv[1:]
encode = SentencePieceTokenizer.encode_batch

def held(self, *args, **options):
    print("holding", flush=True)
    sys.stdin.readline()
    return encode(self, *args, **options)

if role == "first":
    SentencePieceTokenizer.encode_batch = held
print("fingerprint", prepare(source, Path(out), vocab_size=300).fingerprint, flush=True)
"""


def child(role: str, source: Path, out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, role, str(source), str(out)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def lines_until(stream: IO[str] | None, word: str) -> list[str]:
    assert stream is not None
    lines = []
    for line in stream:
        lines.append(line)
        if word in line:
            return lines
    raise AssertionError(f"the process ended without {word!r}: {lines}")


@pytest.mark.parametrize("outcome", ["finishes", pytest.param("is killed", marks=pytest.mark.slow)])
def test_one_process_prepares_and_the_other_waits(tmp_path: Path, outcome: str) -> None:
    source, out = folder_of(tmp_path / "src", texts(30)), tmp_path / "out"
    first = child("first", source, out)
    second = None
    try:
        lines_until(first.stdout, "holding")
        assert (tmp_path / ".out.partial").is_dir()
        assert not out.exists()
        second = child("second", source, out)
        lines_until(second.stdout, "waiting for another process")
        if outcome == "finishes":
            written, _ = first.communicate("\n", timeout=120)
            assert first.returncode == 0
        else:
            first.send_signal(signal.SIGKILL)
            first.wait(timeout=120)
        taken, _ = second.communicate(timeout=120)
        assert second.returncode == 0
    finally:
        for process in (first, second):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()
    fingerprint = read_manifest(out).fingerprint
    assert f"fingerprint {fingerprint}" in taken
    if outcome == "finishes":
        assert f"fingerprint {fingerprint}" in written
        assert "prepared already" in taken
        assert "encoded" not in taken
    else:
        assert "encoded" in taken
    check_files(out, read_manifest(out), hashes=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", "out", "src"]


@pytest.mark.slow
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    source, out = folder_of(tmp_path / "src", texts(200)), tmp_path / "out"
    script = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from data.prepare_corpus import prepare\n"
        "import megatron.core.datasets.indexed_dataset\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))\n"
        "try:\n"
        "    prepare(sys.argv[1], Path(sys.argv[2]), tokenizer=Path(sys.argv[3]))\n"
        "except OSError as error:\n"
        "    print('refused', error.errno)\n"
    )
    train_sentencepiece(texts(200), tmp_path / "model", vocab_size=VOCAB)
    arguments = [str(path) for path in (source, out, tmp_path / "model")]
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *arguments],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout) == (0, "refused 27\n"), ran.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", "model", "src"]
