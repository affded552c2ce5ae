"""The JAX examples run as their first lines say."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "jax"
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}


def start(*command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        cwd=EXAMPLES,
    )


def printed_by(process: subprocess.Popen[str]) -> str:
    out, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    return out


@pytest.mark.long
def test_linen_and_nnx_learn_and_end_sparse() -> None:
    for script, least in (("linen.py", 80), ("nnx_module.py", 70)):
        printed = printed_by(start(script, "--epochs", "3"))
        (accuracy,) = re.findall(r"accuracy ([\d.]+)%, exactly sparse", printed)
        assert float(accuracy) > least, printed


@pytest.mark.long
def test_equinox_and_haiku_learn_and_end_sparse() -> None:
    printed = printed_by(start("libraries.py", "--epochs", "3"))
    found = re.findall(r"(\w+): accuracy ([\d.]+)%, exactly sparse", printed)
    assert [library for library, _ in found] == ["Equinox", "Haiku"]
    assert all(float(accuracy) > 65 for _, accuracy in found), printed


@pytest.mark.long
def test_an_ensemble_is_trained_and_written(tmp_path: Path) -> None:
    printed = printed_by(start("ensemble.py", "--epochs", "5", "--out", str(tmp_path / "x")))
    found = re.findall(r"rho ([\d.]+): accuracy ([\d.]+)%", printed)
    assert [rho for rho, _ in found] == ["0.00", "0.02", "0.05", "0.10"]
    assert all(float(accuracy) > 60 for _, accuracy in found), printed
    assert f"kept {64 * 128 + 128 * 10 - (64 * 128 + 128 * 10) * 9 // 10} weights" in printed
    assert (tmp_path / "x").exists()


@pytest.mark.long
def test_devices_and_processes_train_what_one_device_trains() -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    common = ("sharded.py", "--epochs", "1")
    one, eight = (printed_by(start(*common, "--devices", n)) for n in ("1", "8"))
    pair = [
        start(*common, "--processes", "2", "--process", n, "--address", address) for n in ("0", "1")
    ]
    two = [printed_by(process) for process in pair]
    results = [re.findall(r"loss ([\d.]+), (\d+) of 17024 zero", text) for text in (one, eight)]
    results.append(re.findall(r"loss ([\d.]+), (\d+) of 17024 zero", "".join(two)))
    assert len(results[0]) == 1
    assert results == [results[0]] * 3
    assert results[0][0][1] == "15321"
    assert "8 devices" in eight
    assert "2 devices" in two[0]


@pytest.mark.long
def test_a_run_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The second run compiles nothing that the first has compiled.
    monkeypatch.setitem(ENVIRONMENT, "JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setitem(ENVIRONMENT, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    command = ("resume.py", str(tmp_path / "run"), "--epochs", "2")
    whole = printed_by(start(*command))
    assert whole.startswith("saved epoch 1\nsaved epoch 2\n")
    # As after an interruption in the second epoch: the method is made for both epochs.
    shutil.rmtree(tmp_path / "run" / "2")
    resumed = printed_by(start(*command))
    assert resumed.startswith("resumed after epoch 1\nsaved epoch 2\n")
    assert resumed.splitlines()[-1] == whole.splitlines()[-1]
