"""Time a layer in several forms, and show which form is fastest."""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

__all__ = [
    "HALF",
    "MARGIN",
    "LayerTiming",
    "interleaved",
    "processor",
    "timing_of",
]

MARGIN = 0.9
"""A form replaces the dense layer if it takes at most this fraction of its time."""

HALF = 0.5
"""Zeros of a layer that is measured: below this no form has been faster."""

_SHORTEST = 1e-3  # seconds of one sample, so that the clock and the call itself count little


def interleaved(
    candidates: Mapping[str, Callable[[], Any]],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Return the seconds of each candidate in every repeat, with the candidates in turn.

    A ``clock`` of the process, `time.process_time`, leaves out what other programs do. It counts
    the seconds of all threads, so it is meant for one.

    Examples
    --------
    >>> {name: len(taken) for name, taken in interleaved({"a": int, "b": str}, 3).items()}
    {'a': 3, 'b': 3}
    """
    calls = {}
    for name, run in candidates.items():
        run()  # compile, allocate, create lazy state
        start = clock()
        run()
        calls[name] = max(1, math.ceil(_SHORTEST / max(1e-7, clock() - start)))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            start = clock()
            for _ in range(calls[name]):
                run()
            times[name].append((clock() - start) / calls[name])
    return times


class LayerTiming(NamedTuple):
    """A layer in the forms that were measured.

    Attributes
    ----------
    name : str
    shape : tuple of int
        That of the weight.
    sparsity : float
        The fraction of zeros in the weight.
    rows : int
        Rows of the inputs, over all calls of the layer in one pass.
    seconds : dict of str to float
        Medians for one pass, by form, of which ``"dense"`` is the first. Empty for a layer that
        was not measured.
    form : str
        The form in the result, such as ``"CSR"``.
    reason : str
        Why the layer stays dense.
    """

    name: str
    shape: tuple[int, ...]
    sparsity: float
    rows: int = 0
    seconds: Mapping[str, float] = {}
    form: str = "dense"
    reason: str = ""


def timing_of(
    layer: LayerTiming,
    times: Sequence[Mapping[str, Sequence[float]]],
    reasons: Mapping[str, str],
    *,
    margin: float = MARGIN,
) -> LayerTiming:
    """Choose the form of a layer.

    Parameters
    ----------
    layer : LayerTiming
        Not measured so far.
    times : sequence of mapping of str to sequence of float
        Of every call, the seconds of each form in every repeat.
    reasons : mapping of str to str
        Why other forms cannot be measured.
    margin : float
        The largest fraction of the dense time that a form may take.

    Examples
    --------
    >>> times = [{"dense": [2.0, 2.0], "CSR": [1.0, 1.1], "BSR": [3.0, 3.0]}]
    >>> timing_of(LayerTiming("a", (4, 4), 0.9), times, {}).form
    'CSR'
    """
    forms = [form for form in times[0] if all(form in each for each in times)]
    totals = {form: [math.fsum(taken) for taken in zip(*(t[form] for t in times), strict=True)]
              for form in forms}  # fmt: skip
    seconds = {form: statistics.median(taken) for form, taken in totals.items()}
    ratios = {
        form: statistics.median(a / b for a, b in zip(taken, totals["dense"], strict=True))
        for form, taken in totals.items()
    }
    best = min(ratios, key=lambda form: ratios[form])
    if best != "dense" and ratios[best] <= margin:
        return layer._replace(seconds=seconds, form=best)
    reason = "no form is a tenth faster" if len(forms) > 1 else "; ".join(reasons.values())
    return layer._replace(seconds=seconds, reason=reason)


def processor() -> str:
    """Return the name of the processor, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
