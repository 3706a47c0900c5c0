"""What a launcher script sets for its ranks: one process a device, proposals, nothing twice."""

from __future__ import annotations

import pytest

import launch.environment
from launch.compose import load_config
from launch.environment import launcher_environment
from parallel.backend.cpu import CpuBackend
from parallel.backend.cuda import CudaBackend
from training.config import RunConfig

CONFIG = load_config("train", RunConfig, ["run_dir=runs/one", "backend=cpu"])


def test_one_process_with_all_cores_where_there_is_no_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(CpuBackend, "num_devices", lambda _: 8)
    found = launcher_environment(CONFIG, {})
    assert (found["NPROC_PER_NODE"], found["OMP_NUM_THREADS"]) == ("1", "8")
    assert found["LOG_DIR"] == "runs/one/logs"
    # Ranks of a second attempt must not meet in the store of the first.
    assert found["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


def test_one_process_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.environment, "detect", lambda _: CudaBackend())
    monkeypatch.setattr(CudaBackend, "num_devices", lambda _: 4)
    found = launcher_environment(CONFIG, {})
    assert found["NPROC_PER_NODE"] == "4"
    assert found["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"


def test_what_is_set_stays_and_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuBackend, "num_devices", lambda _: 8)
    found = launcher_environment(CONFIG, {"NPROC_PER_NODE": "2", "LOG_DIR": "elsewhere"})
    assert found["OMP_NUM_THREADS"] == "4"
    assert "NPROC_PER_NODE" not in found
    assert "LOG_DIR" not in found
    assert "OMP_NUM_THREADS" not in launcher_environment(CONFIG, {"OMP_NUM_THREADS": "3"})


@pytest.mark.parametrize("given", ["0", "-1", "gpu", "2.5", ""])
def test_a_number_of_processes_is_a_number(given: str) -> None:
    with pytest.raises(ValueError, match=rf"NPROC_PER_NODE \({given}\) must be a number .* for 1,"):
        launcher_environment(CONFIG, {"NPROC_PER_NODE": given})
