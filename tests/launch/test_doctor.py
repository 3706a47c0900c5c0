"""The doctor's words, from recorded probes and from this machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import launch.doctor
from launch.doctor import report
from parallel.backend.cpu import CpuBackend
from parallel.backend.detect import Probe
from parallel.config import BackendName

ROOT = Path(__file__).resolve().parents[2]
CPU = Probe("2.13.0+cpu", None, None, ())


def test_says_what_why_and_which_kernels() -> None:
    text = report(BackendName.auto, probe=CPU)
    assert "cpu: vendor cpu, torch device cpu, Triton target none" in text
    assert "because backend=auto and this is torch 2.13.0+cpu, 0 devices (none)" in text
    assert "linear attention: chunked" in text
    assert "softmax attention: blocked" in text


def test_marks_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.6.0", "hydra-core": "1.3.8"}

    def version(name: str) -> str:
        if name in versions:
            return versions[name]
        raise launch.doctor.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(launch.doctor.importlib.metadata, "version", version)
    lines = report(BackendName.cpu, probe=CPU).splitlines()
    rows = {line.split()[0]: line for line in lines if line.startswith("  ")}
    assert "2.6.0          untested (everything)" in rows["torch"]
    assert "1.3.8          tested (command lines)" in rows["hydra-core"]
    assert "missing        needed for fast softmax attention" in rows["flash-attn"]


def test_an_untested_device_is_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "untested: this release" not in report(BackendName.cpu, probe=CPU)
    monkeypatch.setattr(launch.doctor, "TESTED_DEVICES", ("abacus",))
    assert "untested: this release ran its tests on abacus only" in report(
        BackendName.cpu, probe=CPU
    )


def test_names_what_a_torch_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = (("time travel", lambda: False, "yesterday is gone"),)
    monkeypatch.setattr(launch.doctor, "TORCH_FEATURES", lacking)
    assert "time travel                no             yesterday is gone" in report(
        BackendName.cpu, probe=CPU
    )


def test_environment_shows_proposed_variables_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "do-not-show")
    proposed = {"A": "1", "B": "2", "C": "3"}
    monkeypatch.setattr(CpuBackend, "proposed_environment", lambda _: proposed)
    monkeypatch.delenv("A", raising=False)
    monkeypatch.setenv("B", "2")
    monkeypatch.setenv("C", "9")
    text = report(BackendName.cpu, probe=CPU)
    assert "A is not set; 1 is proposed" in text
    assert "B=2, as proposed" in text
    assert "C=9; 3 is proposed" in text
    assert "do-not-show" not in text


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.doctor", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_command_exits_with_0_and_maca_is_refused_by_name() -> None:
    done = run()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Back end\n")
    refused = run("backend=maca")
    assert refused.returncode == 1
    assert "error: backend (maca) must be cpu or cuda in this release" in refused.stderr
