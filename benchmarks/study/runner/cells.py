"""The runs of a study, and the file that holds their results."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from .methods import Sparsity
from .recipe import Recipe

__all__ = ["Cell", "append_result", "cells", "mend_results", "read_results"]


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

    @property
    def title(self) -> str:
        """The name of the run in messages."""
        target = "" if self.sparsity is None else f" at {self.sparsity}"
        noise = f", label noise {self.noise:g}" if self.noise else ""
        return f"{self.method}{target}{noise}, seed {self.seed}, {self.framework}"


def cells(recipe: Recipe) -> list[Cell]:
    """Return all runs of a study. Runs of one method and sparsity are consecutive.

    Examples
    --------
    >>> from importlib.resources import files
    >>> from safe_core.study.runner import read_recipe
    >>> recipe = read_recipe(files("safe_core.study") / "recipes" / "table-2-digits.toml")
    >>> cells(recipe)[0]
    Cell(framework='torch', noise=0.25, method='ADMM', sparsity=0.7, seed=0)
    """
    return [
        Cell(framework, noise, entry.label, sparsity, seed)
        for framework in recipe.frameworks
        for noise in recipe.data.label_noise
        for entry in recipe.methods
        for sparsity in ((None,) if entry.is_dense else recipe.sparsities)
        for seed in recipe.seeds
    ]


def append_result(file: Path, recipe: Recipe, cell: Cell, result: dict[str, Any]) -> None:
    """Append a finished run as one line, and wait until it is on the disk.

    Examples
    --------
    >>> import tempfile
    >>> from importlib.resources import files
    >>> from safe_core.study.runner import read_recipe
    >>> recipe = read_recipe(files("safe_core.study") / "recipes" / "table-2-digits.toml")
    >>> cell = Cell("jax", 0.5, "SAFE", 0.95, 1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder, "results.jsonl")
    ...     append_result(file, recipe, cell, {"accuracy": 97.5})
    ...     read_results(file, recipe)
    {Cell(framework='jax', noise=0.5, method='SAFE', sparsity=0.95, seed=1): {'accuracy': 97.5}}
    """
    digest = recipe.digest(cell.method, cell.sparsity)
    line = json.dumps({"settings": digest, "cell": cell._asdict(), "result": result})
    with file.open("a", encoding="utf-8") as out:
        out.write(line + "\n")
        out.flush()
        os.fsync(out.fileno())


def mend_results(file: Path) -> None:
    """Remove an incomplete last line, before new lines are appended."""
    if file.exists():
        content = file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            os.truncate(file, len(whole))


def read_results(file: Path, recipe: Recipe) -> dict[Cell, Any]:
    """Return the results of the runs of a recipe, in the order of the recipe.

    Results of other runs are ignored, such as those of a seed that the recipe no longer lists.
    An incomplete last line is ignored too: another process is writing it, or was killed.

    Raises
    ------
    ValueError
        If a run of the recipe used other settings, or a line has another format.
    """
    if not file.exists():
        return {}
    planned = dict.fromkeys(cells(recipe))
    whole, _, _ = file.read_bytes().rpartition(b"\n")
    found = {}
    for number, line in enumerate(whole.decode().split("\n") if whole else (), 1):
        try:
            entry = json.loads(line)
            settings, cell, result = entry["settings"], Cell(**entry["cell"]), entry["result"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{file} must hold one result per line, but line {number} is not a result"
            ) from None
        if cell not in planned:
            continue
        if settings != recipe.digest(cell.method, cell.sparsity):
            raise ValueError(
                f"{file} holds results of {cell.title} with other settings: choose another folder "
                "or label, or use the recipe and the method files of this folder"
            )
        found[cell] = result
    return {cell: found[cell] for cell in planned if cell in found}
