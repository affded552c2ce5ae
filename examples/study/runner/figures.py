"""The figures of a study, as PNG and PDF."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from safe_core.flatness import Landscape
from safe_core.flatness.figures import plot_contours, save

from .cells import Cell
from .methods import Entry
from .recipe import Recipe
from .statistics import FRAMEWORKS, NAMES, mean_and_error

__all__ = ["draw"]

_MARKERS = "osD^vPX*"


def draw(recipe: Recipe, results: Mapping[Cell, Any], out: Path) -> list[Path]:
    """Draw what the results hold, and return the files.

    Each metric of the report against sparsity; for a swept parameter against that, with a
    line for each sparsity; histories against epochs; weights and landscapes of the first seed.

    Examples
    --------
    >>> from importlib.resources import files
    >>> from safe_core.study.runner import read_recipe
    >>> recipe = read_recipe(files("safe_core.study") / "recipes" / "table-2-digits.toml")
    >>> draw(recipe, {}, Path("nothing-to-draw"))
    []
    """
    found: list[Path] = []
    swept = [entry for entry in recipe.methods if entry.swept]
    panels = itertools.product(recipe.frameworks, recipe.data.label_noise)
    for framework, noise in panels:
        here = {c: r for c, r in results.items() if (c.framework, c.noise) == (framework, noise)}
        if not here:
            continue
        tail = _tail(recipe, framework, noise)
        figures = {f"{metric}{tail}": _by_sparsity(recipe, here, metric)
                   for metric in recipe.report.metrics if not swept}  # fmt: skip
        for metric in recipe.report.metrics if swept else ():
            figures[f"{metric}{tail}"] = _by_swept(recipe, swept, here, metric)
        figures |= _histories(recipe, here, tail)
        figures |= _of_first_seed(recipe, here, tail)
        for name, figure in figures.items():
            found += save(figure, out / name)
    return found


def _axes(xlabel: str, ylabel: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    return figure, axes


def _by_sparsity(recipe: Recipe, results: Mapping[Cell, Any], metric: str) -> Figure:
    """A line for each method; equal steps on the axis, as sparsities crowd at the end."""
    figure, axes = _axes("zero weights", NAMES.get(metric, metric))
    places = {s: i for i, s in enumerate(recipe.sparsities)}
    for i, entry in enumerate(recipe.methods):
        if entry.is_dense:
            mean, _ = _statistics(results, entry.label, None, metric)
            if math.isfinite(mean):
                axes.axhline(mean, color="0.4", linestyle="--", label=entry.label)
            continue
        found = [_statistics(results, entry.label, s, metric) for s in places]
        _errorbar(axes, list(places.values()), found, i, entry.label)
    for i, (label, points) in enumerate(_quoted(recipe, results, metric).items()):
        x = [places[s] for s in points]
        axes.plot(x, list(points.values()), ":", color="0.5", marker=_MARKERS[i % 8], label=label)
    axes.set_xticks(list(places.values()), [_percent(s) for s in places])
    axes.legend(fontsize=7)
    return figure


def _by_swept(
    recipe: Recipe, entries: list[Entry], results: Mapping[Cell, Any], metric: str
) -> Figure:
    """A line for each sparsity, against a swept parameter."""
    values = [entry.swept[1] for entry in entries if entry.swept]
    numbers = all(isinstance(v, int | float) for v in values)
    name = entries[0].swept[0] if entries[0].swept else ""
    figure, axes = _axes(name.replace("_", " "), NAMES.get(metric, metric))
    x = values if numbers else list(range(len(values)))
    for i, sparsity in enumerate(recipe.sparsities):
        found = [_statistics(results, entry.label, sparsity, metric) for entry in entries]
        _errorbar(axes, x, found, i, _percent(sparsity))
    if numbers and min(values) > 0 and max(values) >= 10 * min(values):
        axes.set_xscale("log")
    elif not numbers:
        axes.set_xticks(x, [str(v) for v in values])
    axes.legend(fontsize=7)
    return figure


def _histories(recipe: Recipe, results: Mapping[Cell, Any], tail: str) -> dict[str, Figure]:
    """Accuracies and distance over the epochs, in the mean of the seeds."""
    found: dict[str, Figure] = {}
    kept = {c: r["history"] for c, r in results.items() if r.get("history")}
    for sparsity in recipe.sparsities if kept else ():
        for metric in ("accuracy", "dense_accuracy", "distance"):
            figure, axes = _axes("epoch", NAMES[metric])
            for entry in recipe.methods:
                of_seeds = [
                    [(point["epoch"], point[metric]) for point in history]
                    for c, history in kept.items()
                    if c.method == entry.label and c.sparsity in (sparsity, None)
                ]
                if of_seeds:
                    points = np.mean(np.asarray(of_seeds), axis=0)
                    axes.plot(points[:, 0], points[:, 1], label=entry.label)
            axes.legend(fontsize=7)
            found[f"history_{metric}_{str(sparsity).replace(':', 'of')}{tail}"] = figure
    return found


def _of_first_seed(recipe: Recipe, results: Mapping[Cell, Any], tail: str) -> dict[str, Figure]:
    """Histograms of weights, and landscapes, as Figure 1 of Lee et al. 2025 has them."""
    first = {c: r for c, r in results.items() if c.seed == recipe.seeds[0]}
    planes, histograms = {}, {}
    for cell, result in first.items():
        name = f"{cell.method}{'' if cell.sparsity is None else f', {_percent(cell.sparsity)}'}"
        if "landscape" in result:
            plane = {key: np.asarray(value) for key, value in result["landscape"].items()}
            value = f", eigenvalue {result['eigenvalue']:.3g}" if "eigenvalue" in result else ""
            planes[name + value] = Landscape(**plane)
        if "weights_histogram" in result:
            histograms[name] = result["weights_histogram"]
    found = {}
    if planes:
        found[f"landscape{tail}"] = plot_contours(planes)
    if histograms:
        figure, axes = _axes("weight before the last projection", "count")
        for name, histogram in histograms.items():
            axes.stairs(histogram["counts"], histogram["edges"], label=name)
        axes.set_yscale("log")
        axes.legend(fontsize=7)
        found[f"weights{tail}"] = figure
    return found


def _statistics(
    results: Mapping[Cell, Any], label: str, sparsity: Any, metric: str
) -> tuple[float, float]:
    """Mean and error over the seeds; NaN, which is not drawn, where there is nothing."""
    values = [r[metric] for c, r in results.items()
              if (c.method, c.sparsity) == (label, sparsity) and metric in r]  # fmt: skip
    mean, error = mean_and_error(values) if values else (math.nan, None)
    return mean, error or 0.0


def _errorbar(
    axes: Any, x: list[Any], found: list[tuple[float, float]], i: int, label: str
) -> None:
    means, errors = zip(*found, strict=True)
    axes.errorbar(
        x, means, yerr=errors, color=f"C{i % 10}", marker=_MARKERS[i % 8], markersize=4,
        linewidth=1.2, capsize=2, label=label,
    )  # fmt: skip


def _quoted(
    recipe: Recipe, results: Mapping[Cell, Any], metric: str
) -> dict[str, dict[Any, float]]:
    """Means of other sources by sparsity, under labels that say so."""
    noise = next(iter(results)).noise
    by_name = {str(s): s for s in recipe.sparsities}
    found: dict[str, dict[Any, float]] = {}
    for quote in recipe.quoted:
        if quote.metric == metric and quote.noise == noise:
            points = {by_name[name]: v[0] for name, v in quote.values if name in by_name}
            found.setdefault(f"{quote.method} (quoted)", {}).update(points)
    return {label: points for label, points in found.items() if points}


def _percent(sparsity: Any) -> str:
    return sparsity if isinstance(sparsity, str) else f"{100 * sparsity:g}%"


def _tail(recipe: Recipe, framework: str, noise: float) -> str:
    """What tells the files of a framework and a noise apart."""
    parts = [FRAMEWORKS[framework].lower()] if len(recipe.frameworks) > 1 else []
    parts += [f"noise_{noise:g}"] if len(recipe.data.label_noise) > 1 else []
    return "".join(f"_{part}" for part in parts)
