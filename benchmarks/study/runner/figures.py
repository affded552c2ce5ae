"""Draw the figures of a study as PNG and PDF."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from safe_core.flatness import Landscape
from safe_core.flatness.figures import plot_contours, save

from .cells import Cell
from .figures_by_width import by_width
from .methods import Entry
from .plots import DASHES, MARKERS, errorbar, legend, new_axes, plain, scale
from .recipe import Recipe
from .statistics import FRAMEWORKS, NAMES, mean_and_error, percent
from .tables import sparsity_key

__all__ = ["draw"]


def draw(recipe: Recipe, results: Mapping[Cell, Any], out: Path) -> list[Path]:
    """Draw the results, and return the files.

    Metrics of the report are drawn against sparsity and against every swept parameter, with a
    line for each sparsity. A study of several widths also has figures against width. Histories
    are drawn against epochs, weights and landscapes for the first seed.

    Examples
    --------
    >>> from importlib.resources import files
    >>> from safe_core.study.runner import read_recipe
    >>> recipe = read_recipe(files("safe_core.study") / "recipes" / "table-2-digits.toml")
    >>> draw(recipe, {}, Path("nothing-to-draw"))
    []
    """
    found: list[Path] = []
    panels = itertools.product(recipe.frameworks, recipe.data.label_noise, recipe.widths)
    for panel in panels:
        here = {c: r for c, r in results.items() if (c.framework, c.noise, c.width) == panel}
        if not here:
            continue
        tail = _tail(recipe, *panel)
        # Figures against width show all of a study whose sparsities apply to no method.
        alone = len(recipe.widths) > 1 and not recipe.has_sparsities
        figures = {} if alone else _metrics(recipe, here, tail)
        figures |= _histories(recipe, here, tail)
        figures |= _of_first_seed(recipe, here, tail)
        for name, figure in figures.items():
            found += save(figure, out / name)
    if len(recipe.widths) > 1:
        for framework, noise in itertools.product(recipe.frameworks, recipe.data.label_noise):
            here = {c: r for c, r in results.items() if c[:2] == (framework, noise)}
            tail = _tail(recipe, framework, noise)
            for name, figure in by_width(recipe, here).items():
                found += save(figure, out / f"{name}{tail}")
    return found


def _metrics(recipe: Recipe, results: Mapping[Cell, Any], tail: str) -> dict[str, Figure]:
    """Draw metrics against swept parameters, and against sparsity unless all methods are swept."""
    swept: dict[str, list[Entry]] = {}
    for entry in recipe.methods:
        if entry.swept:
            swept.setdefault(entry.swept[0], []).append(entry)
    figures = {}
    for metric in recipe.report.metrics:
        if not all(entry.swept or entry.is_dense for entry in recipe.methods) or not swept:
            figures[f"{metric}{tail}"] = _by_sparsity(recipe, results, metric)
        for name, entries in swept.items():
            figures[f"{metric}_by_{name}{tail}"] = _by_swept(recipe, entries, results, metric)
    return figures


def _colour(recipe: Recipe, label: str) -> Any:
    """Return the colour that a method has in every figure; methods of one sweep share it."""
    if label in recipe.dense:
        return "0.4"
    families = list(dict.fromkeys(e.family for e in recipe.methods if not e.is_dense))
    family = next((e.family for e in recipe.methods if e.label == label), label)
    if family not in families:
        return "0.6"  # a method that is only quoted
    return colormaps["tab10" if len(families) <= 10 else "tab20"](families.index(family))


def _by_sparsity(recipe: Recipe, results: Mapping[Cell, Any], metric: str) -> Figure:
    """Draw a line per method, with equal steps between sparsities, because they crowd near 1."""
    if len(recipe.sparsities) == 1:
        return _by_method(recipe, results, metric)
    figure, axes = new_axes("zero weights", NAMES.get(metric, metric))
    places = {s: i for i, s in enumerate(recipe.sparsities)}
    _dense(axes, recipe, results, metric)
    for i, entry in enumerate(recipe.methods):
        if not entry.is_dense:
            found = [_statistics(results, entry.label, s, metric) for s in places]
            colour = _colour(recipe, entry.label)
            errorbar(axes, list(places.values()), found, i, entry.label, colour)
    labels = [entry.label for entry in recipe.methods]
    for i, (method, points) in enumerate(_quoted(recipe, results, metric).items()):
        # Like the measured line, but hollow and dotted.
        i = labels.index(method) if method in labels else i
        axes.plot(
            [places[s] for s in points], list(points.values()), ":",
            label=f"{plain(method)} (quoted)", color=_colour(recipe, method),
            marker=MARKERS[i % 8], markersize=4, markerfacecolor="none", linewidth=1.2,
        )  # fmt: skip
    axes.set_xticks(list(places.values()), [percent(s) for s in places])
    scale(axes, metric)
    legend(figure, axes)
    return figure


def _by_method(recipe: Recipe, results: Mapping[Cell, Any], metric: str) -> Figure:
    """Draw a point per method, for the one sparsity of a study."""
    (sparsity,) = recipe.sparsities
    figure, axes = new_axes(f"{NAMES.get(metric, metric)}, at {percent(sparsity)}", "")
    entries = list(reversed(recipe.methods))
    for i, entry in enumerate(entries):
        found = _statistics(results, entry.label, sparsity, metric)
        if found is not None:
            axes.errorbar(
                found[0], i, xerr=found[1], color=_colour(recipe, entry.label), marker="o",
                markersize=4, capsize=2, linestyle="none",
            )  # fmt: skip
    axes.set_yticks(range(len(entries)), [plain(entry.label) for entry in entries])
    axes.set_ylim(-0.5, len(entries) - 0.5)
    figure.set_figheight(0.9 + 0.2 * len(entries))
    return figure


def _by_swept(
    recipe: Recipe, entries: list[Entry], results: Mapping[Cell, Any], metric: str
) -> Figure:
    """Draw a line per method and sparsity against a swept parameter."""
    swept = [entry.swept for entry in entries if entry.swept]
    values = list(dict.fromkeys(str(value) for _, value in swept))
    figure, axes = new_axes(swept[0][0].replace("_", " "), NAMES.get(metric, metric))
    places = _places([value for _, value in swept])
    families = dict.fromkeys(entry.family for entry in entries)
    _dense(axes, recipe, results, metric)
    for i, (family, sparsity) in enumerate(itertools.product(families, recipe.sparsities)):
        own = [entry for entry in entries if entry.family == family]
        x = [places[values.index(str(entry.swept[1]))] for entry in own if entry.swept]
        found = [_statistics(results, entry.label, sparsity, metric) for entry in own]
        name = f"{family}, {percent(sparsity)}" if len(families) > 1 else percent(sparsity)
        shade = recipe.sparsities.index(sparsity) / len(recipe.sparsities)
        colour = _lighter(_colour(recipe, own[0].label), 0.75 * shade)
        errorbar(axes, x, found, i, name, colour, DASHES[list(families).index(family) % 4])
    if places != list(range(len(places))):
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(places, values, fontsize=7 if len(values) > 8 else None)
    scale(axes, metric)
    legend(figure, axes)
    return figure


def _lighter(colour: Any, share: float) -> tuple[float, ...]:
    """Return a colour mixed with white, for the sparsities of one method."""
    return tuple(1 - (1 - part) * (1 - share) for part in to_rgb(colour))


def _places(values: list[Any]) -> list[float]:
    """Return positions of values: the values if all are positive, else equal steps."""
    distinct = list({str(value): value for value in values}.values())
    if all(isinstance(v, int | float) and not isinstance(v, bool) and v > 0 for v in distinct):
        return distinct
    return list(range(len(distinct)))


def _dense(axes: Any, recipe: Recipe, results: Mapping[Cell, Any], metric: str) -> None:
    for entry in recipe.methods:
        mean, _ = _statistics(results, entry.label, None, metric) or (math.nan, 0)
        if entry.is_dense and not entry.swept and math.isfinite(mean):
            axes.axhline(mean, color="0.4", linestyle="--", label=plain(entry.label))


def _histories(recipe: Recipe, results: Mapping[Cell, Any], tail: str) -> dict[str, Figure]:
    """Draw accuracies and distance over the epochs, averaged over seeds."""
    found: dict[str, Figure] = {}
    kept = {c: r["history"] for c, r in results.items() if r.get("history")}
    for sparsity in recipe.sparsities if kept else ():
        for metric in ("accuracy", "dense_accuracy", "distance"):
            figure, axes = new_axes("epoch", NAMES[metric])
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            for entry in recipe.methods:
                of_seeds = [
                    [(point["epoch"], point[metric]) for point in history]
                    for c, history in kept.items()
                    if c.method == entry.label and c.sparsity in (sparsity, None)
                ]
                if of_seeds:
                    _history(axes, of_seeds, recipe, entry)
            if not axes.lines:  # one point is no history
                continue
            legend(figure, axes)
            found[f"history_{metric}_{str(sparsity).replace(':', 'of')}{tail}"] = figure
    return found


def _history(axes: Any, of_seeds: list[Any], recipe: Recipe, entry: Entry) -> None:
    """Draw the mean over seeds as a line, and a standard error on each side as a band."""
    points = np.asarray(of_seeds, float)
    if points.shape[1] < 2:
        return
    epochs, mean = points[0, :, 0], points[:, :, 1].mean(axis=0)
    colour = _colour(recipe, entry.label)
    style = "--" if entry.is_dense else "-"
    axes.plot(epochs, mean, style, label=plain(entry.label), color=colour, linewidth=1.2)
    if len(points) > 1:
        error = points[:, :, 1].std(axis=0, ddof=1) / np.sqrt(len(points))
        axes.fill_between(epochs, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)


def _of_first_seed(recipe: Recipe, results: Mapping[Cell, Any], tail: str) -> dict[str, Figure]:
    """Draw weight histograms and landscapes, as in Figure 1 of Lee et al. 2025."""
    found = {}
    for sparsity in recipe.sparsities:
        first = {
            c.method: r
            for c, r in results.items()
            if c.seed == recipe.seeds[0] and c.sparsity in (sparsity, None)
        }
        name = f"_{str(sparsity).replace(':', 'of')}" if len(recipe.sparsities) > 1 else ""
        planes = {_titled(m, r): _plane(r) for m, r in first.items() if "landscape" in r}
        if planes:
            wide = 2.2 * len(planes) if len(planes) > 3 else None
            found[f"landscape{name}{tail}"] = plot_contours(planes, width=wide)
        histograms = {
            m: r["weights_histogram"] for m, r in first.items() if "weights_histogram" in r
        }
        if histograms:
            found[f"weights{name}{tail}"] = _weights(recipe, histograms)
    return found


def _titled(method: str, result: Mapping[str, Any]) -> str:
    name = plain(method)
    return f"{name}\neigenvalue {result['eigenvalue']:.3g}" if "eigenvalue" in result else name


def _plane(result: Mapping[str, Any]) -> Landscape:
    return Landscape(**{key: np.asarray(value) for key, value in result["landscape"].items()})


def _weights(recipe: Recipe, histograms: Mapping[str, Any]) -> Figure:
    figure, axes = new_axes("weight before the last projection", "count")
    for entry in recipe.methods:
        if entry.label in histograms:
            held = histograms[entry.label]
            colour = _colour(recipe, entry.label)
            axes.stairs(held["counts"], held["edges"], label=plain(entry.label), color=colour)
    axes.set_yscale("log")
    legend(figure, axes)
    return figure


def _statistics(
    results: Mapping[Cell, Any], label: str, sparsity: Any, metric: str
) -> tuple[float, float] | None:
    """Return mean and error over seeds: NaN if all diverged, None if nothing was run.

    A run without a sparsity counts at every sparsity.
    """
    here = [r for c, r in results.items() if c.method == label and c.sparsity in (sparsity, None)]
    values = [result[metric] for result in here if result.get(metric) is not None]
    mean, error = mean_and_error(values) if values else (math.nan, None)
    return (mean, error or 0.0) if here else None


def _quoted(
    recipe: Recipe, results: Mapping[Cell, Any], metric: str
) -> dict[str, dict[Any, float]]:
    """Return quoted means by method and sparsity."""
    noise = next(iter(results)).noise
    found: dict[str, dict[Any, float]] = {}
    for quote in recipe.quoted:
        if quote.metric == metric and quote.noise == noise:
            means = {sparsity_key("values", name): v[0] for name, v in quote.values}
            points = {s: means[s] for s in recipe.sparsities if s in means}
            found.setdefault(quote.method, {}).update(points)
    return {method: points for method, points in found.items() if points}


def _tail(recipe: Recipe, framework: str, noise: float, width: float | None = None) -> str:
    """Return the end of file names that distinguishes frameworks, noises and widths."""
    parts = [FRAMEWORKS[framework].lower()] if len(recipe.frameworks) > 1 else []
    parts += [f"noise_{noise:g}"] if len(recipe.data.label_noise) > 1 else []
    parts += [] if width is None else [f"width_{width:g}"]
    return "".join(f"_{part}" for part in parts)
