"""Group runs that share one training, and say which runs cannot work or will not do well."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from safe_core import Method
from safe_core.step import Operation

from .cells import Cell
from .plan import plan
from .recipe import Recipe

__all__ = ["FEW_UPDATES", "check", "hints", "part", "side", "trains_dense", "units"]

FEW_UPDATES = 15
_SIDES = {"torch": "in_torch", "jax": "in_jax"}
_STEPS = 60  # per epoch; whether a method trains a dense network does not depend on it
Unit = tuple[Cell, ...]


def side(framework: str) -> Any:
    """Return the module that trains in a framework, which is imported on first use."""
    return importlib.import_module(f".{_SIDES[framework]}", __package__)


def part(framework: str, name: str) -> Any:
    """Return the ``Learner`` or ``Subject`` of a framework."""
    return getattr(side(framework), f"{framework.capitalize()}{name}")


def trains_dense(method: Method | None) -> bool:
    """Return whether a method trains as without a method, and projects at the end only.

    Examples
    --------
    >>> import safe_core
    >>> trains_dense(safe_core.magnitude(0.9)), trains_dense(safe_core.admm(0.9, penalty=0.1))
    (True, False)
    """
    if method is None:
        return True
    steps = method.plan()
    harmless = {Operation.OBSERVE_GRADIENTS, Operation.BASE_STEP, Operation.UPDATE_STATE}
    return (
        method.importance is None
        and not steps.masks_gradients
        and [e.point for e in steps.evaluations] == ["x"]
        and set(steps.operations) <= harmless
    )


def units(recipe: Recipe, left: Iterable[Cell]) -> list[Unit]:
    """Return the runs in groups that share one training.

    Dense networks, and those that are pruned only after training, share theirs.
    """
    dense: dict[str, bool] = {}
    for entry in recipe.methods:
        epochs = entry.trained(recipe.training).epochs
        targets = entry.examples(recipe.sparsities)
        built = [entry.build(s, epochs=epochs, steps_per_epoch=_STEPS, seed=0) for s in targets]
        dense[entry.label] = all(map(trains_dense, built))
    found: dict[Any, list[Cell]] = {}
    for cell in left:
        training = recipe.training_of(cell.method)
        shared = (cell.framework, cell.noise, cell.seed, cell.width, training)
        found.setdefault(shared if dense[cell.method] else cell, []).append(cell)
    return [tuple(unit) for unit in found.values()]


def check(recipe: Recipe, left: Iterable[Cell], folder: Path | None, device: str) -> list[str]:
    """Build one run of every kind, without training it; return hints.

    Raises
    ------
    Exception
        The error that the run would end with. A note names the run.
    """
    found: dict[str, None] = {}
    for cell in _kinds(left):
        try:
            made = plan(recipe, cell, folder)
            side(cell.framework).check(made, device)
            if made.pruning is not None:
                pruned = replace(made, method=made.pruning.method)
                side(cell.framework).check(pruned, device)
        except Exception as error:
            error.add_note(f"in {cell.title}; nothing was trained")
            raise
        found |= dict.fromkeys(hints(cell, made))
    return list(found)


def _kinds(left: Iterable[Cell]) -> Iterator[Cell]:
    """Yield one run for every framework, method and sparsity, at its first width."""
    seen = set()
    for cell in left:
        kind = cell._replace(seed=0, noise=0.0, width=None)
        if kind not in seen:
            seen.add(kind)
            yield cell


def hints(cell: Cell, made: Any) -> Iterator[str]:
    """Yield what to change in a run that is too short for its method."""
    updates = made.dual_updates
    if updates is None or updates >= FEW_UPDATES:
        return
    steps = made.steps_per_epoch * made.training.epochs
    interval = max(1, steps // (2 * FEW_UPDATES))
    epochs = -(-FEW_UPDATES * made.method.constraint.dual_update_interval // made.steps_per_epoch)
    yield (
        f"{cell.method} makes only {updates} dual updates in {steps} steps, too few to come near "
        f"its constraint: expect a large loss in the final projection. Set dual_update_interval = "
        f"{interval}, or train for at least {epochs} epochs"
    )
