"""Train and measure one run, or several that share their training."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safe_core import Method

from .cells import Cell
from .dense_start import dense_start
from .machine import machine, peak_memory, reset_peak_memory
from .measure import MakeSubject, accuracy, constraint_distance, is_finite, measure
from .plan import Learner, Plan, plan
from .pruned_start import with_pruned_start
from .recipe import Evaluation, Recipe
from .units import part, side, trains_dense

__all__ = ["run_cell", "run_unit"]

Result = dict[str, Any]


def run_cell(recipe: Recipe, cell: Cell, **settings: Any) -> Result:
    """Train and measure one network; see `run_unit`.

    Returns
    -------
    dict
        The measurements by name, ``seconds`` of training, ``losses`` by epoch, ``versions``,
        ``machine``, and ``history`` if the recipe asks for it. A run whose loss becomes infinite
        or NaN has ``diverged`` instead of measurements.

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
    return run_unit(recipe, (cell,), **settings)[cell]


def run_unit(
    recipe: Recipe,
    unit: tuple[Cell, ...],
    *,
    folder: Path | None = None,
    device: str = "cpu",
    jobs: int = 1,
    advance: Callable[[], None] = lambda: None,
) -> dict[Cell, Result]:
    """Train one network, project it by each method of the unit, and measure each.

    Parameters
    ----------
    recipe : Recipe
    unit : tuple of Cell
        One of its `units`.
    folder : Path, optional
        Folder of the data files; by default that of the recipe.
    device : str
        Device to train on, such as "cpu" or "cuda".
    jobs : int
        Number of processes that share the machine, which the results record.
    advance : callable
        Called after each epoch.
    """
    start = dense_start(recipe, unit[0], folder, device)
    made = [
        with_pruned_start(replace(plan(recipe, cell, folder), start=start), cell, device)
        for cell in unit
    ]
    first, framework = made[0], unit[0].framework
    if trains_dense(first.method):
        first = replace(first, method=None)
    there = side(framework)
    make_learner = part(framework, "Learner")
    _warm_up(make_learner, first, device)
    reset_peak_memory()
    there.peak_memory(device)
    learner: Learner = make_learner(first, device)
    make: MakeSubject = partial(_subject, part(framework, "Subject"), first, device)
    methods = {cell: p.method for cell, p in zip(unit, made, strict=True)}
    found = _trained(recipe.evaluation, first, learner, methods, make, advance)
    on_device = there.peak_memory(device)
    common = {
        "peak_memory": peak_memory() if on_device is None else on_device / 2**20,
        "versions": {name: version(name) for name in ("safe-core", framework)},
        "machine": machine(device, there.device_name(device), jobs),
    }
    if common["peak_memory"] is None:
        del common["peak_memory"]
    return {cell: {**result, **common} for cell, result in found.items()}


def _warm_up(make_learner: Any, made: Plan, device: str) -> None:
    """Take one step of a network that is thrown away, so that no run's time has compilation."""
    loss = make_learner(made, device).step(*next(iter(made.batches(0))))
    float(loss)


def _trained(
    evaluation: Evaluation,
    made: Plan,
    learner: Learner,
    methods: dict[Cell, Method | None],
    make: MakeSubject,
    advance: Callable[[], None],
) -> dict[Cell, Result]:
    losses: list[float] = []
    histories: dict[Cell, list[dict[str, float]]] = {cell: [] for cell in methods}
    seconds = 0.0
    for epoch in range(made.training.epochs):
        start = time.perf_counter()
        of_epoch = [learner.step(images, labels) for images, labels in made.batches(epoch)]
        losses.append(sum(map(float, of_epoch)) / len(of_epoch))
        seconds += time.perf_counter() - start
        if not math.isfinite(losses[-1]):
            lost = {"diverged": True, "losses": losses[:-1], "seconds": seconds}
            return {cell: dict(lost) for cell in methods}
        if evaluation.history_epochs and (epoch + 1) % evaluation.history_epochs == 0:
            for cell, method in methods.items():
                snapshot = _snapshot(made, learner, method, make)
                histories[cell].append({"epoch": epoch + 1, **snapshot})
        advance()
    dense = learner.variables()
    if not is_finite(dense):  # because of the last step
        lost = {"diverged": True, "losses": losses, "seconds": seconds}
        return {cell: dict(lost) for cell in methods}
    found = {}
    for cell, method in methods.items():
        result = measure(evaluation, made, make, dense, learner.projected(method))
        result |= {"seconds": seconds, "losses": losses}
        found[cell] = result | ({"history": histories[cell]} if histories[cell] else {})
    return found


def _snapshot(
    made: Plan, learner: Learner, method: Method | None, make: MakeSubject
) -> dict[str, float]:
    """Measure the network during training, before and after a projection of a copy."""
    dense, sparse = learner.variables(), learner.projected(method)
    return {
        "accuracy": accuracy(make(sparse), made.data.test),
        "dense_accuracy": accuracy(make(dense), made.data.test),
        "distance": constraint_distance(dense, sparse),
    }


def _subject(subject: Any, made: Plan, device: str, variables: Any) -> Any:
    return subject(made.architecture, made.normalisation, variables, device)
