"""Draw results, gains and best values of sweeps against the width of the network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from .cells import Cell
from .gains import Gain, gains, swept_by
from .plots import errorbar, legend, new_axes, plain, scale
from .recipe import Recipe
from .statistics import NAMES, mean_and_error, percent

__all__ = ["by_width"]

_COLOURS = colormaps["tab10"]


def by_width(recipe: Recipe, results: Mapping[Cell, Any]) -> dict[str, Figure]:
    """Return figures of one framework and label noise by name, with a line for each method.

    A sweep is drawn in shades of one colour for the metrics, and as one line for its gain.
    """
    figures = {f"{m}_by_width": _metric(recipe, results, m) for m in recipe.report.metrics}
    found = gains(recipe, results)
    if found:
        figures["gain_by_width"] = _gain(recipe, found)
    chosen = [gain for gain in found if isinstance(gain.best, int | float)]
    for name in dict.fromkeys(swept_by(recipe, gain) for gain in chosen):
        mine = [gain for gain in chosen if swept_by(recipe, gain) == name]
        figures[f"best_{name}_by_width"] = _best(recipe, mine, name)
    return figures


def _metric(recipe: Recipe, results: Mapping[Cell, Any], metric: str) -> Figure:
    figure, axes = new_axes("width", NAMES.get(metric, metric))
    families = list(dict.fromkeys(entry.family for entry in recipe.methods))
    for i, entry in enumerate(recipe.methods):
        own = [e for e in recipe.methods if e.family == entry.family]
        strength = 1 - 0.7 * own.index(entry) / len(own)
        colour = (*_COLOURS(families.index(entry.family) % 10)[:3], strength)
        values: dict[Any, dict[float, list[float]]] = {}
        for cell, result in results.items():
            if cell.method == entry.label and cell.width is not None:
                at = values.setdefault(cell.sparsity, {}).setdefault(cell.width, [])
                at += [] if result.get(metric) is None else [result[metric]]
        for sparsity, by_place in values.items():
            several = sparsity is not None and len(values) > 1
            label = f"{entry.label}, {percent(sparsity)}" if several else entry.label
            points = [mean_and_error(v) if v else (math.nan, None) for v in by_place.values()]
            found = [(mean, error or 0.0) for mean, error in points]
            errorbar(axes, list(by_place), found, i, label, colour)
    _mark_widths(recipe, axes)
    scale(axes, metric)
    legend(figure, axes)
    return figure


def _gain(recipe: Recipe, found: list[Gain]) -> Figure:
    figure, axes = new_axes("width", "gain in accuracy, points")
    axes.axhline(0, color="0.4", linewidth=0.8)
    lines: dict[tuple[str, Any], list[Gain]] = {}
    for gain in found:
        lines.setdefault((gain.title, gain.sparsity), []).append(gain)
    for i, ((title, sparsity), own) in enumerate(lines.items()):
        several = sparsity is not None and len(recipe.sparsities) > 1
        points = [mean_and_error(gain.values) for gain in own]
        errorbar(
            axes,
            [gain.width for gain in own],  # type: ignore[misc]
            [(mean, error or 0.0) for mean, error in points],
            i,
            f"{title}, {percent(sparsity)}" if several else title,
            _COLOURS(i % 10),
        )
    _mark_widths(recipe, axes)
    legend(figure, axes)
    return figure


def _best(recipe: Recipe, found: list[Gain], name: str) -> Figure:
    figure, axes = new_axes("width", f"best {name.replace('_', ' ')}")
    for i, title in enumerate(dict.fromkeys(gain.title for gain in found)):
        own = [gain for gain in found if gain.title == title]
        axes.plot(
            [gain.width for gain in own],
            [gain.best for gain in own],
            color=_COLOURS(i % 10),
            marker="o",
            markersize=4,
            label=plain(title),
        )
    _mark_widths(recipe, axes)
    if all(gain.best > 0 for gain in found):
        axes.set_yscale("log")
    legend(figure, axes)
    return figure


def _mark_widths(recipe: Recipe, axes: Any) -> None:
    """Use a logarithmic axis with a tick at every width of the study."""
    widths = [width for width in recipe.widths if width is not None]
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks(widths, [f"{width:g}" for width in widths])
