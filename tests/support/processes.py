"""Processes that work side by side, for tests of sharded and replicated training."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
"""The environment of a script that calls `fork`."""


def output_of(*arguments: str) -> str:
    """Run Python with these arguments, check that it succeeds, and return what it prints."""
    finished = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        env=ENVIRONMENT,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def fork(world: int, work: Callable[[int, str], None]) -> None:
    """Call ``work(rank, store)`` in one process per rank, and exit with the worst of their codes.

    ``store`` is the path of a file for `torch.distributed.init_process_group`.
    """
    import torch

    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(world):
            child = os.fork()
            if child == 0:
                torch.set_num_threads(1)
                try:
                    work(rank, f"{folder}/store")
                    sys.stdout.flush()
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
                    sys.stderr.flush()
                    os._exit(1)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(max(map(abs, codes)))
