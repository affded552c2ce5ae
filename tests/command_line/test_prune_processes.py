"""The command `prune` in two processes: one folder, one output, one error."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from command_line import SHORT, run
from processes import ENVIRONMENT, fork

from safe_core.command_line.app import app

FAILS_IN_ONE = """
import os

import safe_core


def SOLVER(weight, gram, sparsity, *, layout):
    if os.environ["RANK"] == "1":
        raise ValueError("the solver fails in process 1")
    return safe_core.project(weight, sparsity, layout=layout)
"""


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
LAUNCHERS = {
    "torchrun": (*TORCHRUN, "-m", "safe_core.command_line.app"),
    # This file imports once, which takes ten seconds, and forks. torchrun imports in each process.
    "forked": (__file__,),
}


def together(launcher: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command in two processes."""
    return subprocess.run(
        [sys.executable, *LAUNCHERS[launcher], *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        env=ENVIRONMENT,
    )


launchers = pytest.mark.parametrize(
    "launcher", ["forked", pytest.param("torchrun", marks=pytest.mark.long)]
)


@launchers
def test_processes_write_and_print_once(
    launcher: str, folder: Path, text: Path, tmp_path: Path
) -> None:
    out, alone = tmp_path / "out", tmp_path / "alone"
    prune = ["prune", folder, "--calibration", text, *SHORT, "--method", "wanda", "--out"]
    done = together(launcher, *prune, out, "--work-dir", tmp_path / "work", "--shard")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved in") == 1
    assert done.stderr.count("block 1 of 2, relative error ") == 1
    planned = "14 weights of model.layers on cpu in 2 processes, memory beside the"
    assert done.stderr.count(planned) == 1
    assert "| device | cpu in 2 processes |" in (out / "README.md").read_text()
    assert {file.name for file in (tmp_path / "work").glob("block-*")} == {
        "block-00000.safetensors", "block-00001.safetensors"
    }  # fmt: skip
    assert run(*prune, alone).exit_code == 0
    models = [transformers.LlamaForCausalLM.from_pretrained(path) for path in (out, alone)]
    pairs = zip(*(model.parameters() for model in models), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.long
@launchers
def test_an_error_in_one_process_is_printed_once(
    launcher: str, folder: Path, text: Path, tmp_path: Path
) -> None:
    (tmp_path / "solver.py").write_text(FAILS_IN_ONE)
    done = together(
        launcher, "prune", folder, "--calibration", text, *SHORT, "--out", tmp_path / "out",
        "--method", f"{tmp_path / 'solver.py'}:SOLVER",
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("safe-core: the solver fails in process 1\nNothing was kept.") == 1
    assert done.stderr.count("safe-core: ") == 1
    assert not done.stdout
    assert not list(tmp_path.glob("*out*"))


def work(rank: int, port: int) -> None:
    """Run the command with the variables of torchrun that it reads."""
    signal.alarm(200)  # A process that waits for the other must end before the test does.
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    try:
        app(sys.argv[1:])
    except SystemExit as end:
        if end.code:
            raise


if __name__ == "__main__":
    for name in ("safe_core.command_line.dry_run", "safe_core.command_line.pruning"):
        importlib.import_module(name)
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    fork(2, lambda rank, store: work(rank, server.port))
