"""Train and measure one run."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .cells import Cell
from .measure import MakeSubject, accuracy, constraint_distance, is_finite, measure
from .plan import Learner, Plan, plan
from .recipe import Evaluation, Recipe

__all__ = ["run_cell"]

_SIDES = {"torch": ("in_torch", "Torch"), "jax": ("in_jax", "Jax")}


def run_cell(
    recipe: Recipe,
    cell: Cell,
    *,
    folder: Path | None = None,
    device: str = "cpu",
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Train and measure one network.

    Parameters
    ----------
    recipe : Recipe
    cell : Cell
        One of its `cells`.
    folder : Path, optional
        Folder of the data files; by default that of the recipe.
    device : str
        Device to train on, such as "cpu" or "cuda".
    advance : callable
        Called after each epoch.

    Returns
    -------
    dict
        The measurements by name, ``seconds`` of training, ``losses`` by epoch, ``versions``, and
        ``history`` if the recipe asks for it. A run whose loss becomes infinite or NaN has
        ``diverged`` instead of measurements.

    Examples
    --------
    >>> from safe_core.study.runner import cells, parse_recipe
    >>> recipe = parse_recipe('''
    ... title = "tiny"
    ... sparsities = [0.9]
    ... seeds = [0]
    ... frameworks = ["torch"]
    ... data = {name = "digits", train_images = 64}
    ... model = {name = "lenet-300-100", width = 0.1}
    ... training = {epochs = 1, batch_size = 32, learning_rate = 0.1}
    ... methods = [{method = "safe"}]
    ... ''')
    >>> found = run_cell(recipe, cells(recipe)[0])
    >>> found["zeros"], found["weights"]
    (2088, 2320)
    """
    made = plan(recipe, cell, folder)
    module, prefix = _SIDES[cell.framework]
    side = importlib.import_module(f".{module}", __package__)
    learner: Learner = getattr(side, f"{prefix}Learner")(made, device)
    subject = getattr(side, f"{prefix}Subject")
    make: MakeSubject = partial(_subject, subject, made, device)
    found = _trained(recipe.evaluation, made, learner, make, advance)
    found["versions"] = {name: version(name) for name in ("safe-core", cell.framework)}
    return found


def _trained(
    evaluation: Evaluation,
    made: Plan,
    learner: Learner,
    make: MakeSubject,
    advance: Callable[[], None],
) -> dict[str, Any]:
    losses: list[float] = []
    history: list[dict[str, float]] = []
    seconds = 0.0
    for epoch in range(made.training.epochs):
        start = time.perf_counter()
        of_epoch = [learner.step(images, labels) for images, labels in made.batches(epoch)]
        losses.append(sum(map(float, of_epoch)) / len(of_epoch))
        seconds += time.perf_counter() - start
        if not math.isfinite(losses[-1]):
            return {"diverged": True, "losses": losses[:-1], "seconds": seconds}
        if evaluation.history_epochs and (epoch + 1) % evaluation.history_epochs == 0:
            history.append({"epoch": epoch + 1, **_snapshot(made, learner, make)})
        advance()
    dense = learner.variables()
    if not is_finite(dense):  # because of the last step
        return {"diverged": True, "losses": losses, "seconds": seconds}
    sparse = learner.projected()
    found = measure(evaluation, made, make, dense, sparse)
    found |= {"seconds": seconds, "losses": losses}
    return found | ({"history": history} if history else {})


def _snapshot(made: Plan, learner: Learner, make: MakeSubject) -> dict[str, float]:
    """Measure the network during training, before and after a projection of a copy."""
    dense, sparse = learner.variables(), learner.projected()
    return {
        "accuracy": accuracy(make(sparse), made.data.test),
        "dense_accuracy": accuracy(make(dense), made.data.test),
        "distance": constraint_distance(dense, sparse),
    }


def _subject(subject: Any, made: Plan, device: str, variables: Any) -> Any:
    return subject(made.architecture, made.normalisation, variables, device)
