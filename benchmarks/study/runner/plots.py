"""Draw the parts that the figures of a study share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .statistics import LOWER_IS_BETTER

__all__ = ["DASHES", "FONT", "MARKERS", "errorbar", "legend", "new_axes", "plain", "scale"]

MARKERS = "osD^vPX*"
DASHES = ("-", "--", "-.", ":")
COLUMN = 3.3  # width of a column on a two-column page, in inches
FONT = 8  # points


def new_axes(xlabel: str, ylabel: str) -> tuple[Figure, Any]:
    """Return a figure as wide as a column, and its axes."""
    figure = Figure(figsize=(COLUMN, 0.75 * COLUMN), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(xlabel, fontsize=FONT)
    axes.set_ylabel(ylabel, fontsize=FONT)
    axes.tick_params(labelsize=FONT - 1)
    axes.grid(alpha=0.3)
    return figure, axes


def plain(label: str) -> str:
    """Return a label as matplotlib draws it: without formulas, and with a first underscore.

    Examples
    --------
    >>> plain("$x$"), plain("_y")
    ('\\\\$x\\\\$', ' _y')
    """
    text = label.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def legend(figure: Figure, axes: Any) -> None:
    """Add a legend, below the axes if it is long enough to cover lines."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 4:
        columns = 2 if max(map(len, labels)) < 24 else 1
        rows = -(-len(labels) // columns)
        figure.set_figheight(figure.get_figheight() + 0.16 * rows)
        figure.legend(
            handles, labels, loc="outside lower center", ncols=columns, fontsize=FONT - 1.5
        )
    elif labels:
        axes.legend(fontsize=FONT - 1.5)


def scale(axes: Any, metric: str) -> None:
    """Use a logarithmic axis if positive values span more than a factor of 30."""
    values = np.asarray([y for line in axes.lines for y in line.get_ydata()], float)
    values = values[np.isfinite(values)]
    positive = metric in LOWER_IS_BETTER and values.size and values.min() > 0
    if positive and values.max() >= 30 * values.min():
        axes.set_yscale("log")


def errorbar(
    axes: Any,
    x: Sequence[float],
    found: Sequence[tuple[float, float] | None],
    i: int,
    label: str,
    colour: Any,
    dashes: str = "-",
) -> None:
    """Draw a line through the available points; mark a method whose runs all diverged."""
    held = [point for point in zip(x, found, strict=True) if point[1] is not None]
    if not held:
        return
    x, pairs = zip(*held, strict=True)
    means, errors = zip(*pairs, strict=True)
    lost = all(map(math.isnan, means))
    axes.errorbar(
        x, means, yerr=errors, color=colour, marker=MARKERS[i % 8], markersize=4, linewidth=1.2,
        linestyle=dashes if len(held) > 1 else "none", capsize=2,
        label=f"{plain(label)} (diverged)" if lost else plain(label),
    )  # fmt: skip
