"""Compare methods with the one that they name as ``against``, run by run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .cells import Cell
from .recipe import Recipe
from .statistics import Entry, Table, mean_and_error, shown, tells

__all__ = ["Gain", "gain_tables", "gains", "swept_by"]


@dataclass(frozen=True)
class Gain:
    """The gain in accuracy of a method, or of the methods of one sweep, at one place.

    Attributes
    ----------
    family : str
        The label of the method, without the suffix of a sweep.
    against : str
    framework, noise, sparsity, width
        As in `Cell`.
    values : tuple of float
        Accuracy minus that of ``against``, in percentage points, one for each seed. In a sweep
        each seed uses the value that is best on average over the other seeds.
    best : object
        The swept value that is best on average over all seeds; None without a sweep.
    """

    family: str
    against: str
    framework: str
    noise: float
    sparsity: Any
    width: float | None
    values: tuple[float, ...]
    best: Any

    @property
    def title(self) -> str:
        """The comparison in words."""
        return f"{self.family} over {self.against}"


def gains(recipe: Recipe, results: Mapping[Cell, Any]) -> list[Gain]:
    """Return the gains of all methods with ``against``, where all seeds are finished.

    A value of a sweep that is chosen on the runs that it is reported on looks better than it is.
    So the value for one seed is chosen on the others, if there are any. A run that diverged has an
    accuracy of 0.

    Examples
    --------
    >>> from safe_core.study.runner import parse_recipe
    >>> recipe = parse_recipe('''
    ... title = "tiny"
    ... sparsities = [0.9]
    ... seeds = [0, 1]
    ... data = {name = "digits"}
    ... model = {name = "lenet-300-100"}
    ... training = {epochs = 1, batch_size = 32, learning_rate = 0.1}
    ... [[methods]]
    ... method = "dense"
    ... [[methods]]
    ... method = "dense"
    ... label = "SAM"
    ... against = "dense"
    ... sweep = {rho = [0.1, 0.2]}
    ... ''')
    >>> found = {"dense": [90.0, 90.0], "SAM, rho = 0.1": [93.0, 91.0]}
    >>> found["SAM, rho = 0.2"] = [90.0, 92.0]
    >>> results = {
    ...     Cell("jax", 0.0, method, None, seed): {"accuracy": accuracy}
    ...     for method, of_seeds in found.items() for seed, accuracy in enumerate(of_seeds)
    ... }
    >>> (gain,) = gains(recipe, results)
    >>> gain.values, gain.best  # seed 0 takes the best radius of seed 1, and the other way round
    ((0.0, 1.0), 0.1)
    """
    accuracies = {cell: result.get("accuracy", 0.0) for cell, result in results.items()}
    families: dict[str, list[Any]] = {}
    for entry in recipe.methods:
        if entry.against is not None:
            families.setdefault(entry.family, []).append(entry)
    places = itertools.product(recipe.frameworks, recipe.data.label_noise, recipe.widths)
    return [
        Gain(family, entries[0].against, *place, *compared)
        for framework, noise, width in places
        for family, entries in families.items()
        for sparsity in recipe.targets(entries[0], width)
        for place in [(framework, noise, sparsity, width)]
        for compared in _compared(recipe, accuracies, entries, place)
    ]


def _compared(
    recipe: Recipe, accuracies: Mapping[Cell, float], entries: Sequence[Any], place: Any
) -> Iterator[tuple[tuple[float, ...], Any]]:
    """Yield the gains by seed and the best value, or nothing if runs are missing."""
    framework, noise, sparsity, width = place

    def of_seeds(label: str, target: Any) -> list[float]:
        cells = [Cell(framework, noise, label, target, seed, width) for seed in recipe.seeds]
        return [accuracies[cell] for cell in cells if cell in accuracies]

    base, count = recipe.entry(entries[0].against), len(recipe.seeds)
    target = sparsity if sparsity in recipe.targets(base, width) else None
    ground = of_seeds(base.label, target)
    found = [of_seeds(entry.label, sparsity) for entry in entries]
    if any(len(row) < count for row in (ground, *found)):
        return
    values = []
    for i in range(count):
        others = [j for j in range(count) if j != i] or [i]
        best = max(found, key=lambda row: sum(row[j] for j in others))
        values.append(best[i] - ground[i])
    totals = list(map(sum, found))
    swept = entries[totals.index(max(totals))].swept
    yield tuple(values), swept and swept[1]


def gain_tables(recipe: Recipe, results: Mapping[Cell, Any]) -> list[Table]:
    """Return a table of gains for every framework, and one of the best values of each sweep.

    Columns are the widths of the study.
    """
    found = gains(recipe, results)
    tables = []
    for framework in dict.fromkeys(gain.framework for gain in found):
        here = [gain for gain in found if gain.framework == framework]
        told = [shown("framework", framework)] if len(recipe.frameworks) > 1 else []
        chosen = [gain for gain in here if gain.best is not None]
        notes = []
        if len(recipe.seeds) > 1:
            notes.append(f"Mean and standard error over {len(recipe.seeds)} seeds")
            if chosen:
                notes.append("each seed uses the swept value that is best on the other seeds")
        elif chosen:
            notes.append("with the best swept value, which favours it over a single run")
        entries = [mean_and_error(gain.values) for gain in here]
        tables.append(
            _table(recipe, here, entries, ["gain in accuracy, points", *told], tuple(notes))
        )
        for name in dict.fromkeys(swept_by(recipe, gain) for gain in chosen):
            mine = [gain for gain in chosen if swept_by(recipe, gain) == name]
            numbers = [(gain.best, None) for gain in mine if isinstance(gain.best, int | float)]
            if len(numbers) == len(mine):
                caption = [f"best {name} by accuracy", *told]
                tables.append(_table(recipe, mine, numbers, caption, ()))
    return tables


def swept_by(recipe: Recipe, gain: Gain) -> str:
    """Return the name of the parameter of a sweep."""
    return next(e.swept[0] for e in recipe.methods if e.family == gain.family and e.swept)


def _table(
    recipe: Recipe,
    found: Sequence[Gain],
    numbers: Sequence[tuple[float, float | None]],
    caption: list[str],
    notes: tuple[str, ...],
) -> Table:
    several = len({gain.sparsity for gain in found}) > 1
    rows = [_row(recipe, gain, several) for gain in found]
    places, widths = list(dict.fromkeys(rows)), list(dict.fromkeys(g.width for g in found))
    exact = max(len(f"{mean:g}".partition(".")[2]) for mean, _ in numbers)
    digits = 2 if any(error is not None for _, error in numbers) else exact
    entries = {
        (places.index(row), widths.index(gain.width)): Entry(mean, error, digits=digits)
        for row, gain, (mean, error) in zip(rows, found, numbers, strict=True)
    }
    heads = ("method", *(["noise"] if tells(recipe, "noise") else []))
    return Table(
        caption=": ".join([recipe.title, ", ".join(caption)]),
        heads=(*heads, *(["sparsity"] if several else [])),
        rows=tuple(places),
        columns=tuple("gain" if w is None else shown("width", w) for w in widths),
        entries=entries,
        notes=notes,
    )


def _row(recipe: Recipe, gain: Gain, several: bool) -> tuple[str, ...]:
    noise = (shown("noise", gain.noise),) if tells(recipe, "noise") else ()
    size = (
        () if not several else ("" if gain.sparsity is None else shown("sparsity", gain.sparsity),)
    )
    return (gain.title, *noise, *size)
