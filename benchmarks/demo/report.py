"""Show the demo's table in the terminal, and write it as Markdown and JSON."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table

from .recipe import CHOSEN, Recipe
from .study import Cell

__all__ = ["FRAMEWORKS", "as_json", "as_markdown", "as_rich", "mean_and_error", "write"]

FRAMEWORKS = {"torch": "PyTorch", "jax": "JAX"}
COLUMNS = (
    "method",
    "target",
    "zeros",
    "setting",
    "accuracy, %",
    "eigenvalue",
    "distance",
)
LEGEND = (
    "LeNet-300-100 on scikit-learn's handwritten digits. One-shot: the smallest weights of the "
    "dense network removed. Fine-tuned: then trained again under that mask, with the same "
    "recipe. GMP: gradual magnitude pruning. Published: SAFE as in its paper. Safe: SAFE without "
    "numbers. Target: the sparsity asked for. Zeros: zero weights out of all weights. Setting, "
    "chosen on held-out images: the final penalty, or the fraction of the steps over which the "
    "sparsity rises. Accuracy: test accuracy after the final projection, mean and standard error "
    "over seeds. Eigenvalue: the largest eigenvalue of the Hessian of the training loss after the "
    "final projection. Distance: Euclidean distance from the constraint before it."
)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error, which is NaN for a single value."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, math.nan
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def _plus_minus(values: Sequence[float]) -> str:
    mean, error = mean_and_error(values)
    return f"{mean:.2f}" if math.isnan(error) else f"{mean:.2f} ± {error:.2f}"


def tables(cells: Sequence[Cell]) -> dict[str, list[tuple[str, ...]]]:
    """Return rows of text in the order of `COLUMNS`, by the title of their table."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for cell in cells:
        noise = f"{100 * cell.noise:g}% label noise" if cell.noise else "clean labels"
        found.setdefault(f"{FRAMEWORKS[cell.framework]}, {noise}", []).append(
            (
                cell.method,
                "" if cell.sparsity is None else f"{100 * cell.sparsity:g}%",
                f"{cell.zeros}/{cell.weights}",
                "" if cell.setting is None else f"{CHOSEN[cell.method]} {cell.setting:g}",
                _plus_minus(cell.accuracy),
                _plus_minus(cell.eigenvalue),
                "" if cell.sparsity is None else _plus_minus(cell.distance),
            )
        )
    return found


def as_rich(cells: Sequence[Cell]) -> list[RenderableType]:
    """Return the tables for a terminal of 80 columns, with a legend."""
    parts: list[RenderableType] = []
    for title, rows in tables(cells).items():
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, pad_edge=False)
        for column in COLUMNS:
            table.add_column(
                column, justify="left" if column == "method" else "right", no_wrap=True
            )
        for row in rows:
            table.add_row(*row, style="bold" if row[0] == "safe" else None)
        parts.append(table)
    return [*parts, LEGEND]


def as_markdown(cells: Sequence[Cell]) -> str:
    """Return the tables as a Markdown page, with the versions of the libraries."""
    lines = [LEGEND, "", "Made with " + ", ".join(map(" ".join, _versions(cells).items())) + "."]
    for name, rows in tables(cells).items():
        lines += ["", f"**{name}**", "", "| " + " | ".join(COLUMNS) + " |"]
        lines += ["|" + "|".join(" ---: " if i else " --- " for i in range(len(COLUMNS))) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def as_json(cells: Sequence[Cell], recipe: Recipe) -> str:
    """Return every number of every seed as JSON."""
    entries: list[dict[str, Any]] = []
    for cell in cells:
        entry = {key: value for key, value in vars(cell).items() if key != "layers"}
        for name in ("accuracy", "eigenvalue", "distance"):
            mean, error = mean_and_error(entry[name])
            entry[f"{name}_mean"] = mean
            entry[f"{name}_standard_error"] = None if math.isnan(error) else error
        entries.append(entry)
    document = {"recipe": asdict(recipe), "versions": _versions(cells), "cells": entries}
    return json.dumps(document, indent=2) + "\n"


def write(cells: Sequence[Cell], recipe: Recipe, folder: Path) -> list[Path]:
    """Write the table in both formats, and return the files."""
    texts = {"table.md": as_markdown(cells), "results.json": as_json(cells, recipe)}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def _versions(cells: Sequence[Cell]) -> dict[str, str]:
    """Return the versions of Python and of the packages that made the cells."""
    frameworks = dict.fromkeys(cell.framework for cell in cells)
    found = {"Python": platform.python_version()}
    for name in ("safe-core", *frameworks, "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # such as a build of torch under another name
            found[name] = "of unknown version"
    return found
