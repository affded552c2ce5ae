"""Measure the accuracy that each saving of the method costs.

Trains the demo's network in JAX, with and without each saving, and prints a Markdown table.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

import safe_core
from safe_core.demo import data, train_jax
from safe_core.demo.recipe import Recipe, Run
from safe_core.perturbations import SAM

from .report import machine

__all__ = ["Saving", "savings"]

PENALTY = 0.1
TABLE = Path(__file__).resolve().parent.parent / "docs" / "savings_table.md"


@dataclass(frozen=True)
class Saving(Recipe):
    """The demo's protocol with one saving in the method."""

    state_dtype: str | None = None
    interval: int = 1
    reuse: float = 0.0

    def method(self, run: Run, steps: int) -> safe_core.Method:
        """Return the demo's method with the saving."""
        perturbation = SAM(self.rho, interval=self.interval, reuse=self.reuse)
        plain = super().method(run, steps)
        constraint = replace(plain.constraint, state_dtype=self.state_dtype)  # ADMM
        return replace(plain, perturbation=perturbation, constraint=constraint)

    def __post_init__(self) -> None:
        if self.ascent_share < 1 and self.interval > 1:
            raise ValueError(
                "ascent_share must be 1 if interval is above 1, because steps without perturbation "
                f"use the first gradient, got {self.ascent_share!r}"
            )

    @property
    def gradients(self) -> float:
        """Full-batch gradients per step."""
        return 1 + self.ascent_share / self.interval if self.rho else 1


def variants(**common: Any) -> dict[str, Saving]:
    """Return every saving by its name in the table."""
    plain = Saving(**common)
    named = {"SAFE": plain, '`state_dtype="bfloat16"`': replace(plain, state_dtype="bfloat16")}
    for interval in (2, 5, 10):
        for reuse in (0.0, 0.5):
            options = f"`perturbation_interval={interval}" + (f", reuse={reuse}`" if reuse else "`")
            named[options] = replace(plain, interval=interval, reuse=reuse)
    named["ascent on half of the batch"] = replace(plain, ascent_share=0.5)
    named["no perturbation (ADMM, the same penalty)"] = replace(plain, rho=0.0)
    return named


def savings(
    recipes: dict[str, Saving], cells: list[tuple[float, float]], seeds: int
) -> Iterator[tuple[str, list[list[float]]]]:
    """Yield the test accuracies of every recipe by (label noise, sparsity) and seed."""
    for name, recipe in recipes.items():
        found = []
        for noise, sparsity in cells:
            accuracies = []
            for seed in range(seeds):
                run = Run("published", noise, seed, sparsity, PENALTY)
                given = data.load(recipe, run)
                layers = data.initial_layers(recipe, run, given.inputs.shape[1])
                _, projected = train_jax.train(recipe, run, given, layers, "cpu")
                accuracies.append(data.accuracy(projected, *given.test))
            found.append(accuracies)
        yield name, found


def standard_error(values: list[float]) -> float:
    """Return the standard error of the mean, NaN for a single value."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")


def main() -> None:
    """Train, print the table, and write it if asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.savings", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds")
    parser.add_argument(
        "--quick", action="store_true", help="train six epochs only, to check that everything runs"
    )
    parser.add_argument("--docs", action="store_true", help="update the table in docs/")
    options = parser.parse_args()
    recipes = variants(epochs=6 if options.quick else Recipe.epochs)
    cells = [(noise, s) for noise in (0.0, 0.5) for s in (0.95, 0.98, 0.99)]
    heads = [f"{100 * s:g}%, {100 * noise:g}% noise" for noise, s in cells]
    lines = ["| | gradients per step | " + " | ".join(heads) + " |", "| --- " * 8 + "|"]
    for name, found in track(savings(recipes, cells, options.seeds), total=len(recipes)):
        scores = " | ".join(f"{np.mean(a):.1f} ± {standard_error(a):.1f}" for a in found)
        lines.append(f"| {name} | {recipes[name].gradients:.2g} | {scores} |")
    where = f"{machine()['CPU']}, {machine()['libraries']}"
    note = f"Test accuracy in percent, mean and standard error of {options.seeds} seeds; {where}."
    table = "\n".join([*lines, "", note]) + "\n"
    print(table)
    if options.docs:
        TABLE.write_text(table)


if __name__ == "__main__":
    main()
