"""The examples run as their first lines say, and a killed run resumes to the same bits."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "torch"
COMMANDS = {
    "mixed precision, bf16": ("mixed_precision.py", "--epochs", "3"),
    "mixed precision, fp16": ("mixed_precision.py", "--half", "--epochs", "3"),
    "compiled": ("compiled.py", "--epochs", "3"),
    "accumulation": ("accumulation.py", "--epochs", "3"),
    "from a dense model": ("from_dense.py", "--epochs", "3"),
    "choosing the penalty": (
        "penalty.py",
        "--penalties",
        "100",
        "--epochs",
        "10",
        "--sparsity",
        "0.9",
    ),
    "fine-tuning": ("fine_tune.py", "--epochs", "3"),
    "a faster file": ("faster_file.py", "--data", "digits", "--epochs", "5"),
    "accelerate": ("accelerate_loop.py", "--epochs", "2"),
    "lightning": ("lightning_module.py", "--epochs", "2", "--precision", "bf16-mixed"),
}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"}


def run(*command: str) -> str:
    finished = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=ENVIRONMENT, cwd=EXAMPLES
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.mark.long
@pytest.mark.parametrize("name", COMMANDS)
def test_an_example_learns(name: str) -> None:
    printed = run(sys.executable, *COMMANDS[name])
    accuracies = re.findall(r"accuracy ([\d.]+)%", printed)
    assert accuracies
    assert float(accuracies[-1]) > 70, printed


@pytest.mark.long
def test_the_hugging_face_example_ends_sparse() -> None:
    printed = run(sys.executable, "hugging_face.py", "--steps", "4")
    assert "4 steps, loss" in printed
    assert "exactly sparse" in printed


@pytest.mark.long
def test_elsa_in_a_trainer_resumes_to_the_same_bits(tmp_path: Path) -> None:
    command = (sys.executable, "elsa_trainer.py", "--steps", "10")
    whole = run(*command, "--folder", str(tmp_path))
    resumed = run(*command, "--resume", str(tmp_path / "checkpoint-5"))
    for printed in (whole, resumed):
        assert "10 steps, loss" in printed
        assert "exactly sparse" in printed
    assert resumed.splitlines()[-1] == whole.splitlines()[-1]


@pytest.mark.long
@pytest.mark.parametrize(
    "command",
    [
        ("distributed.py", "--epochs", "1", "--local-ascent"),
        ("distributed.py", "--epochs", "1", "--shard"),
        ("elsa_fsdp.py", "--steps", "8"),
    ],
    ids=["ddp", "fsdp", "elsa"],
)
def test_the_distributed_examples_end_sparse(command: tuple[str, ...]) -> None:
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    printed = run(*launcher, "--nproc-per-node", "2", *command)
    assert "exactly sparse" in printed


@pytest.mark.long
def test_a_killed_run_resumes_to_the_bits_of_one_that_never_stopped(tmp_path: Path) -> None:
    def command(name: str) -> list[str]:
        return [sys.executable, "resume.py", str(tmp_path / name), "--epochs", "3"]

    whole = run(*command("whole.pt"))
    child = subprocess.Popen(
        command("killed.pt"), stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=EXAMPLES
    )
    assert child.stdout is not None
    with child.stdout as printed:
        assert printed.readline() == "saved epoch 1\n"
        child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    resumed = run(*command("killed.pt"))
    assert resumed.startswith("resumed after epoch ")
    assert resumed.splitlines()[-1] == whole.splitlines()[-1]


def test_the_notebook_runs_and_its_sparse_network_learns() -> None:
    cells = json.loads((EXAMPLES / "first_steps.ipynb").read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert not any(cell.get("outputs") for cell in cells)
    printed = run(sys.executable, "-c", code.replace("EPOCHS, BATCH = 40", "EPOCHS, BATCH = 8"))
    dense, cut, trained, blocks = (
        float(a)
        for a in re.findall(r"([\d.]+)%\n", printed)[:3] + re.findall(r"layer: ([\d.]+)%", printed)
    )
    assert min(dense, trained, blocks) > 85
    assert cut < trained
    assert "trained to 49,196 zeros of 50,200" in printed
