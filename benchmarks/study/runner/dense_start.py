"""Train the dense network that the methods of a study start from."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from safe_core.study.models import Variables

from .cells import Cell
from .measure import is_finite
from .plan import Learner, plan
from .recipe import Recipe
from .units import part

__all__ = ["dense_start"]


def dense_start(recipe: Recipe, cell: Cell, folder: Path | None, device: str) -> Variables | None:
    """Return the trained dense network of a run, or None if its recipe asks for none.

    Runs that differ only in their method and sparsity start from the same network.

    Raises
    ------
    ValueError
        If dense training diverged.
    """
    dense = recipe.training_of(cell.method).dense
    if dense is None:
        return None
    for like in recipe.methods:
        targets = recipe.targets(like, cell.width)
        if targets and recipe.training_of(like.label).dense == dense:
            cell = cell._replace(method=like.label, sparsity=targets[0])
            break
    return _trained(recipe, cell, folder, device)


@lru_cache(maxsize=8)  # the seeds of one method take turns
def _trained(recipe: Recipe, cell: Cell, folder: Path | None, device: str) -> Variables:
    made = plan(recipe, cell, folder)
    later, dense = made.training.epochs, made.training.dense
    assert dense is not None
    made = replace(made, method=None, training=dense)
    learner: Learner = part(cell.framework, "Learner")(made, device)
    # The order of the batches follows from the number of the epoch. The methods take the first.
    for epoch in range(later, later + dense.epochs):
        for images, labels in made.batches(epoch):
            learner.step(images, labels)
    found = learner.variables()
    if not is_finite(found):
        raise ValueError(
            f"dense training for {dense.epochs} epochs diverged: lower training."
            f"dense_learning_rate, got {dense.learning_rate}"
        )
    return found
