"""Write a graph as a file, check it in a process of its own, and report."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from safe_core import _checks
from safe_core._installed import require

from .candidates import DENSE, FLOAT, SPARSE, Candidate, candidates
from .graph import Graph
from .notes import notes
from .process import FileRuntimeError, measure
from .report import LiteRTReport
from .simplify import simplify

__all__ = ["Settings", "check_settings", "relative_error", "save_graph"]

Array = np.ndarray[Any, Any]
Samples = Sequence[Sequence[Array]]

_TOLERANCES = {"float32": 1e-3, "int8": 0.25}
_SECONDS = 1.0  # of measurements, besides the first five calls
_TIE = 1.05  # a file that computes without zeros may be so much slower


@dataclass(frozen=True)
class Settings:
    """Arguments of ``save_litert`` that do not depend on the framework."""

    weights: str
    batch_size: int | None
    compute: str
    tolerance: float

    def batches(self, shapes: Sequence[tuple[int, ...]]) -> list[Any]:
        """Return the indices of the samples of each call, by the shapes of all inputs.

        Raises
        ------
        ValueError
            If the batch size does not divide the number of samples.
        """
        size = self.batch_size
        if size is None:
            return [...]
        counts = {shape[0] if shape else 0 for shape in shapes}
        if len(counts) != 1 or (count := counts.pop()) == 0 or count % size:
            raise ValueError(
                "batch_size must divide the number of samples, the first axis of all "
                f"example_inputs, got {size} for shapes {list(shapes)}; pass batch_size=None for "
                "inputs without samples"
            )
        return [slice(start, start + size) for start in range(0, count, size)]


def check_settings(
    user: str, *, weights: Any, batch_size: Any, compute: Any, tolerance: Any
) -> Settings:
    """Return the settings, or raise an error that names what is wrong.

    Raises
    ------
    ModuleNotFoundError
        If the packages of the extra ``litert`` are missing.
    TypeError, ValueError
    """
    require(user, "flatbuffers", "ai_edge_litert", extra="litert")
    _checks.choice("weights", weights, ("float32", "int8"))
    _checks.choice("compute", compute, ("fastest", "sparse", "dense"))
    if batch_size is not None:
        batch_size = _checks.integer("batch_size", batch_size, low=1)
    if tolerance is None:
        tolerance = _TOLERANCES[weights]
    return Settings(weights, batch_size, compute, _checks.real("tolerance", tolerance, low=0.0))


def save_graph(
    graph: Graph, samples: Samples, expected: Samples, path: str | Path, settings: Settings
) -> LiteRTReport:
    """Write a graph, compare its file with the outputs of the model, and return a report.

    Parameters
    ----------
    graph : Graph
        It is simplified in place.
    samples, expected : sequence of sequences of arrays
        Inputs and outputs of each call.
    path : str or Path
    settings : Settings

    Raises
    ------
    ValueError
        If the folder of ``path`` does not exist, or the file computes something else than the
        model. Nothing is at ``path`` then that was not there before.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise ValueError(f"path must be in a folder that exists, got {str(target)!r}")
    simplify(graph)
    with tempfile.TemporaryDirectory(prefix="safe_core-") as name:
        folder = Path(name)
        try:
            found, dense_size = candidates(
                graph, samples, folder, weights=settings.weights, compute=settings.compute
            )
            files = [_written(folder / f"{k}.tflite", x) for k, x in enumerate(found.values())]
            answer = measure(files, samples, len(graph.outputs), folder, _SECONDS)
        except FileRuntimeError as error:
            raise ValueError(
                f"the file must run in LiteRT, but {error}; nothing was written to {target}"
            ) from error
    seconds = dict(zip(found, answer.seconds, strict=True))
    errors = {
        key: relative_error(outputs, expected)
        for key, outputs in zip(found, answer.outputs, strict=True)
        if key != FLOAT
    }
    for key, found_error in errors.items():
        if not found_error <= settings.tolerance:  # not a number is wrong, too
            raise ValueError(
                "the file must compute what the model computes, up to a relative error of "
                f"{settings.tolerance:g}, got {found_error:.2g} ({key}); nothing was written to "
                f"{target}{_remedy(settings.weights, found_error)}"
            )
    chosen = _chosen(seconds, settings.compute)
    _replace(target, found[chosen].content)
    layers = found[chosen].layers
    times = {"this file": seconds[chosen]}
    names = {SPARSE: SPARSE, DENSE: f"dense {settings.weights}", FLOAT: FLOAT}
    times |= {names[key]: value for key, value in seconds.items() if key != chosen}
    return LiteRTReport(
        path=target,
        weights=settings.weights,
        batch_size=settings.batch_size,
        layers=layers,
        size=len(found[chosen].content),
        dense_size=dense_size,
        error=errors[chosen],
        seconds=times,
        notes=notes(layers, settings.weights, times, SPARSE, compute=settings.compute),
    )


def _written(file: Path, candidate: Candidate) -> Path:
    file.write_bytes(candidate.content)
    return file


def relative_error(found: Samples, expected: Samples) -> float:
    """Return the largest error of an output for a sample, relative to its usual size."""
    largest = 0.0
    for outputs, wanted in zip(zip(*found, strict=True), zip(*expected, strict=True), strict=True):
        if any(y.shape != r.shape for y, r in zip(outputs, wanted, strict=True)):
            return math.nan
        exact = [r.astype(np.float64).ravel() for r in wanted]
        errors = [np.linalg.norm(y.ravel() - r) for y, r in zip(outputs, exact, strict=True)]
        usual = math.sqrt(np.mean([np.square(r).sum() for r in exact]))
        error = float(np.max(errors)) / (usual or 1.0)  # np.max keeps what is not a number
        if not math.isfinite(error):
            return math.nan
        largest = max(largest, error)
    return largest


def _remedy(weights: str, error: float) -> str:
    """Return what can be done about an error, as the end of a sentence."""
    if math.isnan(error):
        return ""
    samples = "pass more samples of real data as example_inputs, or " if weights == "int8" else ""
    return f"; {samples}raise tolerance= to accept the error"


def _chosen(seconds: dict[str, float], compute: str) -> str:
    if SPARSE not in seconds:
        return DENSE
    if compute == "sparse" or seconds[SPARSE] <= _TIE * seconds[DENSE]:
        return SPARSE
    return DENSE


def _replace(target: Path, content: bytes) -> None:
    """Write a file under another name first, so that no reader sees a part of it."""
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
