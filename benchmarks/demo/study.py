"""Train and measure the networks of the demo."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.sparse.linalg import LinearOperator, eigsh

import safe_core

from .data import Layer, accuracy, initial_layers, load
from .recipe import CHOSEN, TRAINED, Recipe, Run

__all__ = ["Cell", "count_runs", "study"]


@dataclass
class Cell:
    """A row of the table: the networks of all seeds with one setting.

    Attributes
    ----------
    setting : float or None
        The chosen setting of the method, see `Run`.
    accuracy : list of float
        Test accuracy of the projected network in percent, by seed.
    eigenvalue : list of float
        Largest eigenvalue of the Hessian of the training loss at the projected network.
    distance : list of float
        ``|x - proj(x)|_2`` before the last projection.
    zeros, weights : int
        Number of zero weights and of all weights of the projected network, without biases. They
        are the same for every seed.
    seconds : float
        Mean wall-clock time of a training run, with compilation and waiting; for one-shot pruning
        that of the dense run, and for fine-tuning that of the dense run and its own.
    layers : dict
        Networks of the first seed for the figures, by name.
    """

    framework: str
    method: str
    noise: float
    sparsity: float | None
    setting: float | None
    accuracy: list[float]
    eigenvalue: list[float]
    distance: list[float]
    zeros: int
    weights: int
    seconds: float
    layers: dict[str, list[Layer]]


def count_runs(recipe: Recipe) -> int:
    """Return the number of networks that `study` trains."""
    cells = len(recipe.noises) * len(recipe.sparsities)
    candidates = [len(recipe.candidates(method)) for method in CHOSEN]
    choosing = sum(count for count in candidates if count > 1)
    # A dense network for each noise; in each cell a fine-tuned one, and those of `TRAINED`.
    per_seed = len(recipe.noises) + cells * (1 + len(TRAINED) + choosing)
    return len(recipe.seeds) * per_seed


def study(
    recipe: Recipe, framework: str, device: str, advance: Callable[[str], None]
) -> Iterator[Cell]:
    """Train and measure everything in one framework; call ``advance`` after each run."""
    trainer = importlib.import_module(f".train_{framework}", __package__)

    def fit(run: Run, layers: list[Layer] | None = None) -> Any:
        data = load(recipe, run)
        layers = layers or initial_layers(recipe, run, data.inputs.shape[1])
        start = time.perf_counter()
        trained, projected = trainer.train(recipe, run, data, layers, device)
        seconds = time.perf_counter() - start
        target = "" if run.sparsity is None else f" at {100 * run.sparsity:g}%"
        advance(f"{run.method}{target}, {100 * run.noise:g}% label noise, seed {run.seed}")
        return data, trained, projected, seconds

    def measure(run: Run, fits: list[Any]) -> Cell:
        eigenvalues, distances, accuracies = [], [], []
        for data, trained, projected, _ in fits:
            product = trainer.hessian_product(projected, data, device)
            eigenvalues.append(largest_eigenvalue(product, parameter_count(projected)))
            accuracies.append(accuracy(projected, *data.test))
            gaps = [a.weight - b.weight for a, b in zip(trained, projected, strict=True)]
            distances.append(math.sqrt(sum(float(np.sum(gap**2)) for gap in gaps)))
        zeros = {sum(int(np.sum(layer.weight == 0)) for layer in f[2]) for f in fits}
        if len(zeros) > 1:
            raise RuntimeError(f"seeds differ in the number of zeros: {sorted(zeros)}")
        return Cell(
            framework,
            run.method,
            run.noise,
            run.sparsity,
            run.setting,
            accuracies,
            eigenvalues,
            distances,
            zeros.pop(),
            sum(layer.weight.size for layer in fits[0][2]),
            float(np.mean([f[3] for f in fits])),
            {"trained": fits[0][1], "projected": fits[0][2]},
        )

    for noise in recipe.noises:
        dense = [fit(Run("dense", noise, seed)) for seed in recipe.seeds]
        yield measure(Run("dense", noise, 0), dense)
        for sparsity in recipe.sparsities:
            pruned = [(d, x, one_shot(x, sparsity), s) for d, x, _, s in dense]
            yield measure(Run("one-shot", noise, 0, sparsity), pruned)
            tuned = []
            for seed, (*_, layers, seconds) in zip(recipe.seeds, dense, strict=True):
                data, x, projected, own = fit(Run("fine-tuned", noise, seed, sparsity), layers)
                tuned.append((data, x, projected, seconds + own))
            yield measure(Run("fine-tuned", noise, 0, sparsity), tuned)
            for method in TRAINED:
                run = Run(method, noise, 0, sparsity)
                if method in CHOSEN:
                    run = replace(run, setting=choose_setting(recipe, run, fit))
                yield measure(run, [fit(replace(run, seed=seed)) for seed in recipe.seeds])


def choose_setting(recipe: Recipe, run: Run, fit: Callable[[Run], Any]) -> float:
    """Return the setting with the best mean held-out accuracy, the lowest if several are equal."""
    candidates = recipe.candidates(run.method)
    if len(candidates) == 1:
        return candidates[0]

    def held_out_accuracy(setting: float) -> float:
        scores = []
        for seed in recipe.seeds:
            tried = replace(run, setting=setting, seed=seed, held_out=True)
            data, _, projected, _ = fit(tried)
            scores.append(accuracy(projected, *data.validation))
        return float(np.mean(scores))

    return max(candidates, key=held_out_accuracy)


def one_shot(layers: list[Layer], sparsity: float) -> list[Layer]:
    """Prune a trained network by magnitude, over all layers together."""
    weights = safe_core.project([layer.weight for layer in layers], sparsity).values
    return [Layer(w, layer.bias) for w, layer in zip(weights, layers, strict=True)]


def parameter_count(layers: list[Layer]) -> int:
    """Return the number of weights and biases."""
    return sum(layer.weight.size + layer.bias.size for layer in layers)


def largest_eigenvalue(product: Callable[[Any], Any], size: int) -> float:
    """Return the largest eigenvalue of a symmetric operator, by Lanczos iteration."""
    start = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    operator = LinearOperator((size, size), matvec=product, dtype=np.float32)
    return float(eigsh(operator, k=1, which="LA", v0=start, tol=1e-3)[0][0])
