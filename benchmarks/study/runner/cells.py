"""The runs of a study."""

from __future__ import annotations

from typing import NamedTuple

from .methods import Sparsity
from .recipe import Recipe

__all__ = ["Cell", "cells"]


class Cell(NamedTuple):
    """One run: a network trained from one seed by one method.

    Attributes
    ----------
    framework : {"torch", "jax"}
    noise : float
        Fraction of the training labels drawn at random.
    method : str
        The label of a method of the recipe.
    sparsity : float, str or None
        None for dense training.
    seed : int
    width : float or None
        Width of the network; None if the study has one width only.

    Examples
    --------
    >>> Cell("jax", 0.0, "SAFE", 0.95, 1).title
    'SAFE at 0.95, seed 1, jax'
    """

    framework: str
    noise: float
    method: str
    sparsity: Sparsity | None
    seed: int
    width: float | None = None

    @property
    def title(self) -> str:
        """The name of the run in messages."""
        target = "" if self.sparsity is None else f" at {self.sparsity}"
        width = "" if self.width is None else f", width {self.width:g}"
        noise = f", label noise {self.noise:g}" if self.noise else ""
        return f"{self.method}{target}{width}{noise}, seed {self.seed}, {self.framework}"


def cells(recipe: Recipe) -> list[Cell]:
    """Return all runs of a study. Runs of one method and sparsity are consecutive.

    Examples
    --------
    >>> from importlib.resources import files
    >>> from safe_core.study.runner import read_recipe
    >>> recipe = read_recipe(files("safe_core.study") / "recipes" / "table-2-digits.toml")
    >>> cells(recipe)[0]
    Cell(framework='torch', noise=0.25, method='ADMM', sparsity=0.7, seed=0, width=None)
    """
    return [
        Cell(framework, noise, entry.label, sparsity, seed, width)
        for framework in recipe.frameworks
        for noise in recipe.data.label_noise
        for width in recipe.widths
        for entry in recipe.methods
        for sparsity in recipe.targets(entry, width)
        for seed in recipe.seeds
    ]
