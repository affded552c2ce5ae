"""Write every number of every run as CSV."""

from __future__ import annotations

import csv
import io

from .cells import Cell
from .recipe import Recipe
from .results import Found

__all__ = ["as_csv"]

_MACHINE = ("host", "processor", "device", "threads", "jobs")


def as_csv(recipe: Recipe, found: Found) -> str:
    """Return one line for each run, finished or failed, with its measurements and machine.

    Examples
    --------
    >>> from importlib.resources import files
    >>> from safe_core.study.runner import Cell, read_recipe
    >>> recipe = read_recipe(files("safe_core.study") / "recipes" / "table-2-digits.toml")
    >>> results = {Cell("jax", 0.5, "SAFE", 0.95, 1): {"accuracy": 97.5}}
    >>> lines = as_csv(recipe, Found(results, {}, {})).splitlines()
    >>> lines[0].split(",")[4:8], lines[1].split(",")[4:8]
    (['seed', 'width', 'state', 'accuracy'], ['1', '1.0', 'done', '97.5'])
    """

    def placed(cell: Cell) -> Cell:
        return cell._replace(width=recipe.width(cell.width))

    metrics = (*recipe.evaluation.metrics(), "zeros", "weights")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ("framework", "noise", "method", "sparsity", "seed", "width", "state")
    writer.writerow([*names, *metrics, *_MACHINE, "error"])
    for cell, result in found.results.items():
        state = "diverged" if result.get("diverged") else "done"
        where = result.get("machine") or {}
        writer.writerow(
            [
                *_safe(placed(cell)),
                state,
                *map(result.get, metrics),
                *_safe(map(where.get, _MACHINE)),
                "",
            ]
        )
    blank = [""] * (len(metrics) + len(_MACHINE))
    for cell, error in found.failures.items():
        writer.writerow([*_safe(placed(cell)), "failed", *blank, *_safe([error.splitlines()[0]])])
    return text.getvalue()


def _safe(values: object) -> list[object]:
    """Return values that no spreadsheet takes for a formula."""
    listed: list[object] = list(values)  # type: ignore[call-overload]
    return [f"'{v}" if isinstance(v, str) and v[:1] in "=+-@" and v else v for v in listed]
