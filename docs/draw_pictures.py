"""Draw the pictures of patterns, of one step, and of the weights during training.

python docs/draw_pictures.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn

import safe_core
from safe_core import NM, Block, Channel, Unstructured
from safe_core.adapters.torch import SparseOptimizer

OUT = Path(__file__).parent / "_static"
BLUE, RED, GREY = "#0072B2", "#D55E00", "0.88"
PATTERNS = {
    "Unstructured(0.75)": Unstructured(0.75),
    '"2:4"': NM(2, 4),
    "Block((1, 4), 0.75)": Block((1, 4), 0.75),
    "Block((4, 4), 0.75)": Block((4, 4), 0.75),
    "Channel(0.5)": Channel(0.5),
}


def patterns() -> Figure:
    """Return one panel for each pattern, with the entries that it keeps of the same weights."""
    weights = np.random.default_rng(0).normal(size=(16, 16))
    figure = Figure(figsize=(9.5, 2.3), layout="constrained")
    for axes, (name, pattern) in zip(
        figure.subplots(1, len(PATTERNS)), PATTERNS.items(), strict=True
    ):
        kept = safe_core.project(weights, pattern).support
        colours = np.where(kept[..., None], [0, 114 / 255, 178 / 255], [0.9, 0.9, 0.9])
        axes.imshow(colours)
        axes.set_xticks(np.arange(-0.5, 16), [])
        axes.set_yticks(np.arange(-0.5, 16), [])
        axes.tick_params(length=0)
        axes.grid(color="white", linewidth=0.8)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("inputs", fontsize=8)
    figure.axes[0].set_ylabel("outputs", fontsize=8)
    return figure


def step() -> Figure:
    """Return a picture of one step with two weights, of which one may be non-zero."""
    figure = Figure(figsize=(5.2, 4.2), layout="constrained")
    axes = figure.subplots()
    grid = np.linspace(-0.5, 3, 200)
    a, b = np.meshgrid(grid, grid)
    axes.contour(a, b, (a - 2.3) ** 2 + 2.2 * (b - 0.6) ** 2, levels=9, colors=GREY)
    for line in (axes.axhline, axes.axvline):
        line(0, color="black", linewidth=2.5)
    x, e, base, pulled, z = (1.0, 1.9), (0.72, 2.35), (1.38, 1.42), (1.38, 1.05), (1.38, 0.0)
    arrows = (
        (x, e, RED, "perturb: x + e\n(against the descent)", (0.06, 2.5)),
        (x, base, BLUE, "base optimizer, with\nthe gradient at x + e", (1.5, 1.65)),
        (base, pulled, "black", "pull", (1.47, 1.13)),
    )
    for start, end, colour, text, at in arrows:
        axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 2})
        axes.text(*at, text, color=colour, fontsize=9)
    axes.plot(*x, "o", color="black")
    axes.text(0.85, 1.72, "x", fontsize=11)
    axes.plot(*z, "D", color="black")
    axes.text(z[0] + 0.07, z[1] + 0.1, "z, the nearest sparse point", fontsize=9)
    axes.text(0.1, -0.35, "sparse points: one of two weights is zero", fontsize=9)
    axes.set(xlim=(-0.5, 3), ylim=(-0.5, 3), xticks=[], yticks=[])
    axes.set_xlabel("first weight")
    axes.set_ylabel("second weight")
    return figure


def histogram() -> Figure:
    """Return the weights of a network on the digits at four moments of its training."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )
    steps = 800
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = SparseOptimizer(base, safe_core.safe(0.9, steps=steps), model=model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(base, steps)
    moments: dict[str, Any] = {}
    for done in range(steps):
        if done in (0, steps // 4, steps // 2):
            moments[f"after {done} of {steps} steps"] = _weights(optimizer)
        batch = torch.randint(len(x), (64,))

        def closure(batch: torch.Tensor = batch) -> torch.Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            loss.backward()
            return loss

        optimizer.step(closure)
        schedule.step()
    moments[f"after {steps} steps"] = _weights(optimizer)
    figure = Figure(figsize=(9.5, 2.4), layout="constrained")
    panels: list[Axes] = list(figure.subplots(1, len(moments), sharey=True))
    for axes, (name, weights) in zip(panels, moments.items(), strict=True):
        axes.hist(weights, bins=np.linspace(-0.4, 0.4, 81), color=BLUE)
        axes.set_yscale("log")
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("weight", fontsize=8)
        axes.tick_params(labelsize=8)
    panels[0].set_ylabel("number of weights", fontsize=8)
    return figure


def _weights(optimizer: SparseOptimizer) -> np.ndarray:
    found = optimizer.sparse_parameters().values()
    return torch.cat([p.detach().flatten() for p in found]).numpy().copy()


def main() -> None:
    """Write all pictures, with the same bytes in every run."""
    matplotlib.rcParams["svg.hashsalt"] = "safe_core"
    for draw in (patterns, step, histogram):
        draw().savefig(OUT / f"{draw.__name__}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
