"""Run LiteRT files in a process of its own: a broken file can crash the runtime.

This is a script, so that it imports nothing but NumPy and the runtime. It reads a JSON request
from standard input and writes arrays to ``request["results"]``.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType

_CLOCK = (
    time.process_time
    if time.get_clock_info("process_time").resolution < 1e-6
    else time.perf_counter
)
_SHORTEST = 1e-3  # seconds of a block, so that reading the clock counts little


def main() -> None:
    """Answer the request."""
    request = json.load(sys.stdin)
    with np.load(request["samples"]) as held:
        samples = [
            [held[f"{i}_{j}"] for j in range(request["inputs"])] for i in range(request["count"])
        ]
    found: dict[str, Any] = {}
    if request["task"] == "ranges":
        found["ranges"] = ranges(request["files"][0], samples, request["tensors"])
    else:
        interpreters = [load(path) for path in request["files"]]
        for k, interpreter in enumerate(interpreters):
            for i, sample in enumerate(samples):
                for j, output in enumerate(run(interpreter, sample)):
                    found[f"{k}_{i}_{j}"] = output
        found["times"] = np.asarray(
            times(interpreters, samples[0], request["seconds"], request["least"])
        )
    np.savez(request["results"], **found)


def load(path: str, **options: Any) -> Any:
    """Return an interpreter with one thread."""
    interpreter = Interpreter(model_path=path, num_threads=1, **options)
    interpreter.allocate_tensors()
    return interpreter


def run(interpreter: Any, sample: list[Any]) -> list[Any]:
    """Return the outputs for a sample."""
    for detail, value in zip(interpreter.get_input_details(), sample, strict=True):
        interpreter.set_tensor(detail["index"], value)
    interpreter.invoke()
    return [interpreter.get_tensor(d["index"]).copy() for d in interpreter.get_output_details()]


def times(interpreters: list[Any], sample: list[Any], seconds: float, least: int) -> list[float]:
    """Return the median time of a call of each file, with blocks of calls of the files in turn.

    The first call of a block is not timed: it brings back to the cache what other files pushed out.
    """
    found: list[list[float]] = [[] for _ in interpreters]
    end = time.perf_counter() + seconds
    for interpreter in interpreters:
        run(interpreter, sample)
    counts = [_calls(interpreter) for interpreter in interpreters]
    while len(found[0]) < least or (time.perf_counter() < end and len(found[0]) < 200):
        for interpreter, count, durations in zip(interpreters, counts, found, strict=True):
            durations.append(_block(interpreter, count) / count)
    return [statistics.median(durations) for durations in found]


def _calls(interpreter: Any) -> int:
    """Return how many calls take the shortest time of a block."""
    count = 1
    while _block(interpreter, count) < _SHORTEST:
        count *= 2
    return count


def _block(interpreter: Any, count: int) -> float:
    interpreter.invoke()
    start = _CLOCK()
    for _ in range(count):
        interpreter.invoke()
    return _CLOCK() - start


def ranges(path: str, samples: list[list[Any]], tensors: list[int]) -> Any:
    """Return the lowest and highest entries of tensors over all samples."""
    interpreter = load(
        path,
        experimental_preserve_all_tensors=True,
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    found = np.tile(np.asarray([np.inf, -np.inf]), (len(tensors), 1))
    for sample in samples:
        run(interpreter, sample)
        for k, index in enumerate(tensors):
            value = interpreter.get_tensor(index)
            found[k] = min(found[k, 0], value.min()), max(found[k, 1], value.max())
    return found


if __name__ == "__main__":
    main()
