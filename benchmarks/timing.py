"""Time candidates in turn, so that a drift of the machine affects all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Result", "interleaved", "wait"]


@dataclass(frozen=True)
class Result:
    """A measured candidate of a case.

    Attributes
    ----------
    case, name : str
    value : float
        Median, in ``unit``.
    unit : str
    ratio : float
        Median over repeats of the ratio to the baseline in the same repeat.
    budget : float or None
        Largest ratio that meets our target.
    """

    case: str
    name: str
    value: float
    unit: str
    ratio: float
    budget: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return asdict(self)


def interleaved(
    case: str,
    candidates: dict[str, Callable[[], Any]],
    *,
    repeats: int,
    calls: int = 1,
    budgets: dict[str, float] | None = None,
) -> list[Result]:
    """Time candidates in turn. The first is the baseline of the ratios."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():  # compile, allocate, create lazy state
        wait(run())
    for _ in range(repeats):
        for name, run in candidates.items():
            start = time.perf_counter()
            for _ in range(calls):
                result = run()
            wait(result)
            times[name].append((time.perf_counter() - start) / calls)
    baseline = next(iter(times.values()))
    return [
        Result(
            case,
            name,
            1e3 * statistics.median(taken),
            "ms",
            statistics.median(a / b for a, b in zip(taken, baseline, strict=True)),
            (budgets or {}).get(name),
        )
        for name, taken in times.items()
    ]


def wait(result: Any) -> None:
    """Wait until all devices have finished."""
    import jax
    import torch

    jax.block_until_ready([leaf for leaf in jax.tree.leaves(result) if isinstance(leaf, jax.Array)])
    if torch.cuda.is_available():
        torch.cuda.synchronize()
