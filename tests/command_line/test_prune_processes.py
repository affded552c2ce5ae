"""The command `prune` under torchrun: one folder, one output, one error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
import transformers
from command_line import SHORT, run
from processes import ENVIRONMENT

FAILS_IN_ONE = """
import os

import safe_core


def SOLVER(weight, gram, sparsity, *, layout):
    if os.environ["RANK"] == "1":
        raise ValueError("the solver fails in process 1")
    return safe_core.project(weight, sparsity, layout=layout)
"""


def together(*arguments: object) -> subprocess.CompletedProcess[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*torchrun, "-m", "safe_core.command_line.app", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        env=ENVIRONMENT,
    )


def test_processes_write_and_print_once(folder: Path, text: Path, tmp_path: Path) -> None:
    out, alone = tmp_path / "out", tmp_path / "alone"
    prune = ["prune", folder, "--calibration", text, *SHORT, "--method", "wanda", "--out"]
    done = together(*prune, out, "--work-dir", tmp_path / "work", "--shard")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved in") == 1
    assert done.stderr.count("block 1 of 2, relative error ") == 1
    assert "14 weights of model.layers on cpu in 2 processes, memory beside the" in done.stderr
    assert "| device | cpu in 2 processes |" in (out / "README.md").read_text()
    assert {file.name for file in (tmp_path / "work").glob("block-*")} == {
        "block-00000.safetensors", "block-00001.safetensors"
    }  # fmt: skip
    assert run(*prune, alone).exit_code == 0
    models = [transformers.LlamaForCausalLM.from_pretrained(path) for path in (out, alone)]
    pairs = zip(*(model.parameters() for model in models), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_an_error_in_one_process_is_printed_once(folder: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "solver.py").write_text(FAILS_IN_ONE)
    done = together(
        "prune", folder, "--calibration", text, *SHORT, "--out", tmp_path / "out", "--method",
        f"{tmp_path / 'solver.py'}:SOLVER",
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("safe-core: the solver fails in process 1\nNothing was kept.") == 1
    assert done.stderr.count("safe-core: ") == 1
    assert not done.stdout
    assert not list(tmp_path.glob("*out*"))
