"""Draw the demo's figures: test error, and weights and landscape as in Figure 1 of the paper."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draw to files, without a screen

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator
from numpy.typing import NDArray

from .data import Dataset, Layer, cross_entropy, load
from .recipe import Recipe, Run
from .report import FRAMEWORKS, mean_and_error
from .study import Cell

__all__ = ["draw"]

COLOURS = {
    "safe": "C0",
    "published": "C9",
    "admm": "C1",
    "gmp": "C4",
    "fine-tuned": "C3",
    "one-shot": "C2",
    "dense": "0.45",
}
LABELS = {
    "safe": "SAFE, no numbers",
    "published": "SAFE, published",
    "admm": "ADMM",
    "gmp": "GMP",
    "fine-tuned": "magnitude, fine-tuned",
    "one-shot": "magnitude, one-shot",
    "dense": "dense",
}
MARKERS = {"torch": "o", "jax": "x"}
LINES: dict[str, Any] = {"torch": "-", "jax": ":"}
SHOWN = 0.9  # the sparsity of Figure 1
SURFACES = ("admm", "published", "safe")  # the networks whose loss is drawn


def draw(cells: Sequence[Cell], recipe: Recipe, folder: Path) -> list[Path]:
    """Draw all figures as PNG, and return the files."""
    clean = {
        (cell.method, cell.sparsity): cell
        for cell in reversed(cells)
        if cell.noise == min(recipe.noises)
    }
    sparsity = SHOWN if SHOWN in recipe.sparsities else recipe.sparsities[0]
    data = load(recipe, Run("dense", min(recipe.noises), recipe.seeds[0]))
    files = {
        "accuracy.png": _accuracy(cells, recipe),
        "weights.png": _weights(clean["dense", None], clean["safe", sparsity]),
        "landscape.png": _landscape([clean[name, sparsity] for name in SURFACES], data),
    }
    for name, figure in files.items():
        figure.savefig(folder / name, dpi=150, bbox_inches="tight")
        plt.close(figure)
    return [folder / name for name in files]


def _accuracy(cells: Sequence[Cell], recipe: Recipe) -> Figure:
    """Draw the test error after projection against sparsity, for each label noise.

    On a logarithmic axis of the error, accuracies of 96 and 98% are as far apart as 60 and 80%.
    """
    count = len(recipe.noises)
    figure, panels = plt.subplots(
        1, count, figsize=(4.6 * count, 3.8), squeeze=False, constrained_layout=True
    )
    for axes, noise in zip(panels[0], recipe.noises, strict=True):
        _draw_errors(axes, [cell for cell in cells if cell.noise == noise], recipe)
        axes.set_title("clean labels" if noise == 0 else f"{100 * noise:g}% label noise")
    frameworks = list(dict.fromkeys(cell.framework for cell in cells))
    present = {cell.method for cell in cells}
    methods = [
        Line2D([], [], color=COLOURS[method], linewidth=2, label=label)
        for method, label in LABELS.items()
        if method in present
    ]
    styles: list[Any] = [
        Line2D([], [], color="black", linestyle=LINES[f], marker=MARKERS[f], label=FRAMEWORKS[f])
        for f in frameworks
    ]
    figure.legend(handles=methods, title="method", ncols=3, fontsize=8, loc="outside lower left")
    figure.legend(handles=styles, title="framework", fontsize=8, loc="outside lower right")
    return figure


def _draw_errors(axes: Any, cells: Sequence[Cell], recipe: Recipe) -> None:
    """Draw the mean test error of every method and framework, for one label noise."""
    positions = {sparsity: i for i, sparsity in enumerate(recipe.sparsities)}
    for framework, method in itertools.product(dict.fromkeys(c.framework for c in cells), LABELS):
        chosen = [c for c in cells if c.framework == framework and c.method == method]
        if not chosen:
            continue
        statistics = [mean_and_error(c.accuracy) for c in chosen]
        means = [100 - mean for mean, _ in statistics]
        style = {"color": COLOURS[method], "linestyle": LINES[framework]}
        if method == "dense":
            axes.axhline(means[0], **style)
            continue
        axes.errorbar(
            [positions[c.sparsity] for c in chosen if c.sparsity is not None],
            means,
            yerr=np.nan_to_num([error for _, error in statistics]),
            marker=MARKERS[framework],
            capsize=2,
            **style,
        )
    axes.set_xticks(range(len(positions)), [f"{100 * s:g}%" for s in positions])
    axes.set_xlabel("zero weights")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("test error, % (log scale)")
    axes.grid(alpha=0.3)


def _weights(dense: Cell, safe: Cell) -> Figure:
    """Draw histograms of the weights before the final projection."""
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True)
    titles = ("dense", f"SAFE, {100 * (safe.sparsity or 0):g}% sparsity")
    for axes, cell, title in zip(panels, (dense, safe), titles, strict=True):
        weights = np.concatenate([layer.weight.ravel() for layer in cell.layers["trained"]])
        axes.hist(weights, bins=121, range=(-1, 1), color=COLOURS[cell.method])
        axes.set_yscale("log")
        axes.set_title(title)
        axes.set_xlabel("weight before the last projection")
    panels[0].set_ylabel("count")
    return figure


def _landscape(cells: Sequence[Cell], data: Dataset) -> Figure:
    """Draw the training loss around the projected networks, in the same random plane."""
    steps = np.linspace(-1, 1, 25)
    count = len(cells)
    figure, panels = plt.subplots(
        1,
        count,
        figsize=(4.2 * count, 3.8),
        subplot_kw={"projection": "3d"},
        constrained_layout=True,
    )
    surfaces = [_surface(cell.layers["projected"], data, steps) for cell in cells]
    top = max(float(surface.max()) for surface in surfaces)
    for axes, cell, surface in zip(panels, cells, surfaces, strict=True):
        axes.plot_surface(*np.meshgrid(steps, steps), surface, cmap="viridis", vmin=0, vmax=top)
        axes.set_zlim(0, top)
        title = f"{LABELS[cell.method]}: largest eigenvalue {cell.eigenvalue[0]:.2f}"
        axes.set_title(title, color=COLOURS[cell.method])
        axes.set_xlabel("first direction")
        axes.set_ylabel("second direction")
        axes.set_zlabel("training loss")
    return figure


def _surface(layers: list[Layer], data: Dataset, steps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the loss along two random directions with filter normalisation (Li et al. 2018)."""
    rng = np.random.default_rng(0)

    def direction() -> list[NDArray[np.float32]]:
        found = []
        for layer in layers:
            d = rng.standard_normal(layer.weight.shape)
            scale = np.linalg.norm(layer.weight, axis=0) / np.linalg.norm(d, axis=0)
            found.append((d * scale).astype(np.float32))
        return found

    def moved(a: float, b: float) -> list[Layer]:
        return [
            Layer((layer.weight + a * d1 + b * d2).astype(np.float32), layer.bias)
            for layer, d1, d2 in zip(layers, first, second, strict=True)
        ]

    first, second = direction(), direction()
    return np.asarray(
        [[cross_entropy(moved(a, b), data.inputs, data.labels) for a in steps] for b in steps]
    )
