"""Ask a process of its own to run LiteRT files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Answer", "FileRuntimeError", "measure", "ranges"]

Array = np.ndarray[Any, Any]
Sample = Sequence[Array]


class FileRuntimeError(RuntimeError):
    """The LiteRT runtime could not run a file, or crashed."""


class Answer(NamedTuple):
    """Hold the outputs and the times of files.

    Attributes
    ----------
    outputs : list
        ``outputs[k][i][j]`` is output j of file k for sample i.
    seconds : list of float
        Median time of one call, by file.
    """

    outputs: list[list[list[Array]]]
    seconds: list[float]


def measure(
    files: Sequence[Path],
    samples: Sequence[Sample],
    outputs: int,
    folder: Path,
    seconds: float,
    *,
    least: int = 5,
) -> Answer:
    """Run files on samples, and time blocks of calls in turn for some seconds, or ``least`` blocks.

    Raises
    ------
    FileRuntimeError
        If the runtime refuses a file or crashes.
    """
    found = _ask("measure", files, samples, folder, seconds=seconds, least=least)
    values = [
        [[found[f"{k}_{i}_{j}"] for j in range(outputs)] for i in range(len(samples))]
        for k in range(len(files))
    ]
    return Answer(values, [float(t) for t in found["times"]])


def ranges(file: Path, samples: Sequence[Sample], tensors: Sequence[int], folder: Path) -> Array:
    """Return the lowest and highest entries of tensors of a file, over all samples.

    Raises
    ------
    FileRuntimeError
        As for `measure`.
    """
    return _ask("ranges", [file], samples, folder, tensors=list(tensors))["ranges"]


def _ask(
    task: str, files: Sequence[Path], samples: Sequence[Sample], folder: Path, **settings: Any
) -> dict[str, Array]:
    inputs, results = folder / "samples.npz", folder / "results.npz"
    named = {f"{i}_{j}": x for i, sample in enumerate(samples) for j, x in enumerate(sample)}
    np.savez(inputs, **named)  # type: ignore[arg-type]
    request = {
        "task": task,
        "files": [str(file) for file in files],
        "samples": str(inputs),
        "count": len(samples),
        "inputs": len(samples[0]),
        "results": str(results),
        **settings,
    }
    script = Path(__file__).with_name("run_file.py")
    finished = subprocess.run(
        [sys.executable, "-P", str(script)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode < 0:
        raise FileRuntimeError(f"the runtime was ended by signal {-finished.returncode}")
    if finished.returncode != 0:
        lines = finished.stderr.strip().splitlines() or ["without a message"]
        raise FileRuntimeError(f"the runtime refused the file: {lines[-1]}")
    with np.load(results) as held:
        return dict(held)
