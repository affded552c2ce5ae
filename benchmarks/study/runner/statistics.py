"""Arrange results in tables: means and standard errors over seeds, with methods ranked."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from .cells import Cell
from .recipe import AXES, MOMENTS, Recipe
from .tables import sparsity_key

__all__ = [
    "Agreement", "Entry", "Table", "agreement", "decimals", "mean_and_error", "percent", "shown",
    "tables", "tells",
]  # fmt: skip

Place = tuple[Any, ...]  # along AXES
LOWER_IS_BETTER = (
    "distance", "seconds", "peak_memory", "eigenvalue", "trace", "sharpness", *MOMENTS,
)  # fmt: skip
# These say how a method works, or what it costs where it ran; they make no method better.
_NOT_RANKED = ("distance", "seconds", "peak_memory")
NAMES = {
    "accuracy": "accuracy, %",
    "accuracy_untuned": "accuracy without batch-norm tuning, %",
    "dense_accuracy": "accuracy before the projection, %",
    "distance": "distance from the constraint",
    "seconds": "time of training, s",
    "peak_memory": "peak memory, MiB",
    "eigenvalue": "largest Hessian eigenvalue",
    "trace": "Hessian trace",
    "sharpness": "sharpness",
    "moment_2": "second moment of Hessians",
    "moment_3": "third moment of Hessians",
    "moment_4": "fourth moment of Hessians",
    "pgd_linf": "accuracy under PGD, linf, %",
    "pgd_l2": "accuracy under PGD, l2, %",
    **{f"corruption_{i}": f"accuracy on corruptions, intensity {i}, %" for i in range(1, 6)},
    **{f"corruption_ratio_{i}": f"corrupted / clean accuracy, intensity {i}" for i in range(1, 6)},
}
FRAMEWORKS = {"torch": "PyTorch", "jax": "JAX"}


@dataclass(frozen=True)
class Entry:
    """An entry of a table.

    Attributes
    ----------
    mean : float
    error : float or None
        Standard error of the mean; None for a single value.
    diverged : int
        Number of seeds that diverged. They do not count in the mean.
    best : bool
        True for the best method, and for those that are within one joint standard error of it.
    quoted : int
        Number of the source, from 1; 0 for measured entries.
    seeds : int
        Number of runs, including those that diverged.
    digits : int
        Number of decimals, the same for a metric in one column.

    Examples
    --------
    >>> Entry(93.44, 0.01).text()
    '93.44 ± 0.01'
    """

    mean: float
    error: float | None = None
    diverged: int = 0
    best: bool = False
    quoted: int = 0
    seeds: int = 1
    digits: int = 2

    def text(self, join: str = " ± ") -> str:
        """Return the mean and its error."""
        if math.isnan(self.mean):
            return "diverged"
        text = f"{self.mean:.{self.digits}f}"
        return text if self.error is None else f"{text}{join}{self.error:.{self.digits}f}"


def decimals(values: Sequence[float]) -> int:
    """Return the number of decimals that shows three digits of the smallest value.

    It is from 2 to 4, or as many as the largest value needs.

    Examples
    --------
    >>> decimals([97.5, 98.0]), decimals([0.0123, 2330.0]), decimals([0.00001, 0.00002])
    (2, 4, 7)
    """
    sizes = [abs(v) for v in values if math.isfinite(v) and v]
    if not sizes:
        return 2
    small, large = (2 - math.floor(math.log10(size)) for size in (min(sizes), max(sizes)))
    return min(max(2, small), max(4, large))


@dataclass(frozen=True)
class Table:
    """A table of entries by row and column.

    Attributes
    ----------
    caption : str
    heads : tuple of str
        Headings of the columns that name the rows.
    rows : tuple of (tuple of str)
    columns : tuple of str
    entries : dict of (int, int) to Entry
        By row and column number.
    notes : tuple of str
    """

    caption: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    columns: tuple[str, ...]
    entries: Mapping[tuple[int, int], Entry]
    notes: tuple[str, ...]


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and its standard error, which is None for a single value.

    Examples
    --------
    >>> mean_and_error([1.0, 3.0])
    (2.0, 1.0)
    """
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, None
    variance = math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


class Agreement(NamedTuple):
    """Compare the accuracies of the two frameworks.

    Attributes
    ----------
    compared : int
        Number of means that both frameworks have.
    largest : float
        The largest difference, in percentage points.
    apart : list of str
        Runs that differ by more than the larger of one point and three joint standard errors.

    Examples
    --------
    >>> print(Agreement(24, 0.42, []).sentence())
    PyTorch and JAX agree in 24 of 24 accuracies, within the larger of one point and three joint \
standard errors; the largest difference is 0.42 points.
    """

    compared: int
    largest: float
    apart: list[str]

    def sentence(self) -> str:
        """Return the agreement as a sentence."""
        text = (
            f"PyTorch and JAX agree in {self.compared - len(self.apart)} of {self.compared} "
            "accuracies, within the larger of one point and three joint standard errors; the "
            f"largest difference is {self.largest:.2f} points."
        )
        return f"{text} They do not in: {', '.join(self.apart)}." if self.apart else text


def agreement(recipe: Recipe, results: Mapping[Cell, Any]) -> Agreement | None:
    """Compare the mean accuracies of PyTorch and JAX; return None if one of them has none.

    Examples
    --------
    >>> from safe_core.study.runner import parse_recipe
    >>> recipe = parse_recipe('''
    ... title = "tiny"
    ... sparsities = [0.9]
    ... seeds = [0]
    ... frameworks = ["torch", "jax"]
    ... data = {name = "digits"}
    ... model = {name = "lenet-300-100"}
    ... training = {epochs = 1, batch_size = 32, learning_rate = 0.1}
    ... methods = [{method = "admm"}]
    ... ''')
    >>> results = {Cell("jax", 0.0, "admm", 0.9, 0): {"accuracy": 90.0}}
    >>> results[Cell("torch", 0.0, "admm", 0.9, 0)] = {"accuracy": 92.0}
    >>> agreement(recipe, results).apart
    ['admm at 90%']
    """
    means = _means(recipe, results, ("accuracy",))
    compared, largest, apart = 0, 0.0, []
    plain = recipe.without_sparsities
    for (method, sparsity, noise, framework, width, _), ours in means.items():
        theirs = means.get((method, sparsity, noise, "jax", width, "accuracy"))
        repeated = method in plain and sparsity != recipe.sparsities[0]
        if framework != "torch" or theirs is None or repeated:
            continue
        compared += 1
        difference = abs(ours.mean - theirs.mean)
        errors = math.hypot(ours.error or 0.0, theirs.error or 0.0)
        if not (ours.diverged or theirs.diverged):
            largest = max(largest, difference)
        # A mean is NaN if all seeds diverged. If that holds in both frameworks, they agree.
        alike = math.isnan(ours.mean) and math.isnan(theirs.mean)
        if not (difference <= max(1.0, 3 * errors) or alike):
            where = [method if method in plain else f"{method} at {percent(sparsity)}"]
            for axis, value in (("width", width), ("noise", noise)):
                told = tells(recipe, axis)
                where += [shown(axis, value)] if told else []
            apart.append(", ".join(where))
    return Agreement(compared, largest, apart) if compared else None


def tables(recipe: Recipe, results: Mapping[Cell, Any]) -> list[Table]:
    """Return the tables that a recipe asks for.

    Each value of an axis that is neither rows nor columns, such as each framework, gets its own
    table. Dense networks and quoted figures are not ranked.

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
    ... methods = [{method = "admm"}]
    ... ''')
    >>> results = {Cell("jax", 0.0, "admm", 0.9, s): {"accuracy": 90.0 + s} for s in (0, 1)}
    >>> table = tables(recipe, results)[0]
    >>> table.caption, table.entries[0, 0].text()
    ('tiny: accuracy, %', '90.50 ± 0.50')
    """
    found = _ranked(_means(recipe, results, recipe.report.metrics), recipe)
    quotes = _quotes(recipe, found)
    everything = found | quotes
    by = (*recipe.report.rows, recipe.report.columns)
    apart = [i for i, axis in enumerate(AXES) if axis not in by]
    kinds = dict.fromkeys(tuple(place[i] for i in apart) for place in everything)
    return [
        _table(
            recipe,
            {p: e for p, e in everything.items() if tuple(p[i] for i in apart) == kind},
            [shown(AXES[i], v) for i, v in zip(apart, kind, strict=True) if tells(recipe, AXES[i])],
        )
        for kind in kinds
    ]


def _means(
    recipe: Recipe, results: Mapping[Cell, Any], metrics: Sequence[str]
) -> dict[Place, Entry]:
    """Return entries averaged over seeds. A run without a sparsity appears under every one."""
    values: dict[Place, list[float | None]] = {}
    for cell, result in results.items():
        targets = recipe.sparsities if cell.sparsity is None else (cell.sparsity,)
        for metric, sparsity in itertools.product(metrics, targets):
            place = (cell.method, sparsity, cell.noise, cell.framework, cell.width, metric)
            values.setdefault(place, []).append(result.get(metric))
    found = {}
    for place, of_seeds in values.items():
        finite = [v for v in of_seeds if v is not None]
        mean, error = mean_and_error(finite) if finite else (math.nan, None)
        found[place] = Entry(mean, error, len(of_seeds) - len(finite), seeds=len(of_seeds))
    return found


def _ranked(found: dict[Place, Entry], recipe: Recipe) -> dict[Place, Entry]:
    """Mark the best method of each comparison, and all that are within its error."""
    chosen = recipe.report.ranked
    by_default = [metric for metric in recipe.report.metrics if metric not in _NOT_RANKED]
    ranked = dict(found)
    for rest in dict.fromkeys(place[1:] for place in found):
        sign = 1 if rest[-1] in LOWER_IS_BETTER else -1
        group = {
            p: e
            for p, e in found.items()
            if p[1:] == rest and p[0] not in recipe.dense and not math.isnan(e.mean)
        }
        if len(group) < 2 or rest[-1] not in (by_default if chosen is None else chosen):
            continue
        best = min(group.values(), key=lambda entry: (sign * entry.mean, entry.error or 0.0))
        for place, entry in group.items():
            behind = abs(entry.mean - best.mean)
            if behind <= math.hypot(entry.error or 0.0, best.error or 0.0) + 1e-9:
                ranked[place] = replace(entry, best=True)
    return ranked


def _quotes(recipe: Recipe, found: Mapping[Place, Entry]) -> dict[Place, Entry]:
    """Return the quoted figures, repeated for every framework."""
    sources = list(dict.fromkeys(quote.source for quote in recipe.quoted))
    frameworks = dict.fromkeys(place[3] for place in found) or dict.fromkeys(recipe.frameworks)
    entries = {}
    for quote, framework in itertools.product(recipe.quoted, frameworks):
        number = sources.index(quote.source) + 1
        for name, (mean, *error) in quote.values:
            sparsity = sparsity_key("values", name)
            shown = sparsity in recipe.sparsities and quote.noise in recipe.data.label_noise
            if shown and quote.metric in recipe.report.metrics:
                label = f"{quote.method} (quoted {number})"
                place = (label, sparsity, quote.noise, framework, None, quote.metric)
                entries[place] = Entry(mean, error[0] if error else None, quoted=number)
    return entries


def _table(recipe: Recipe, entries: Mapping[Place, Entry], apart: list[str]) -> Table:
    row_axes = [AXES.index(axis) for axis in recipe.report.rows]
    column_axis = AXES.index(recipe.report.columns)
    rows = sorted({tuple(p[i] for i in row_axes) for p in entries}, key=_order(recipe, row_axes))
    columns = sorted({(p[column_axis],) for p in entries}, key=_order(recipe, [column_axis]))
    of_column: dict[Any, list[Entry]] = {}
    for place, entry in entries.items():
        of_column.setdefault((place[column_axis], place[-1]), []).append(entry)
    digits = {key: decimals([entry.mean for entry in held]) for key, held in of_column.items()}
    placed = {
        (rows.index(tuple(p[i] for i in row_axes)), columns.index((p[column_axis],))): replace(
            entry, digits=digits[p[column_axis], p[-1]]
        )
        for p, entry in entries.items()
    }
    return Table(
        caption=": ".join([recipe.title, ", ".join(apart)] if apart else [recipe.title]),
        heads=recipe.report.rows,
        rows=tuple(
            tuple(shown(AXES[i], v) for i, v in zip(row_axes, row, strict=True)) for row in rows
        ),
        columns=tuple(shown(AXES[column_axis], column[0]) for column in columns),
        entries=placed,
        notes=tuple(_notes(recipe, entries)),
    )


def _order(recipe: Recipe, axes: Sequence[int]) -> Any:
    """Return a sort key: the order of the recipe, with quoted figures last."""
    known = {
        "method": [entry.label for entry in recipe.methods],
        "sparsity": recipe.sparsities,
        "noise": recipe.data.label_noise,
        "framework": recipe.frameworks,
        "width": recipe.widths,
        "metric": recipe.report.metrics,
    }

    def key(values: Place) -> list[tuple[int, str]]:
        found = []
        for axis, value in zip(axes, values, strict=True):
            listed = list(known[AXES[axis]])
            found.append((listed.index(value) if value in listed else len(listed), str(value)))
        return found

    return key


def _plain(value: Any) -> str:
    """Return a setting as a recipe writes it."""
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _notes(recipe: Recipe, entries: Mapping[Place, Entry]) -> Iterator[str]:
    held, methods = list(entries.values()), {place[0] for place in entries}
    counts = sorted({entry.seeds for entry in held if not entry.quoted})
    if counts and counts != [len(recipe.seeds)]:
        numbers = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
        yield f"Mean and standard error over {numbers} of {len(recipe.seeds)} seeds"
    elif len(recipe.seeds) > 1:
        yield f"Mean and standard error over {len(recipe.seeds)} seeds"
    if any(entry.best for entry in held):
        yield "in bold: the best mean that was measured, and all within one joint standard error"
    if any(entry.diverged for entry in held):
        yield "in brackets: number of seeds that diverged, which do not count in the mean"
    own: dict[Any, list[str]] = {}
    for entry in recipe.methods:
        if entry.training and entry.label in methods:
            own.setdefault(entry.training, []).append(entry.label)
    for training, labels in own.items():
        settings = ", ".join(f"{name} = {_plain(value)}" for name, value in training)
        yield f"{', '.join(labels)} trained with {settings}"
    sources = list(dict.fromkeys(quote.source for quote in recipe.quoted))
    for number in sorted({entry.quoted for entry in held} - {0}):
        yield f"quoted {number}: from {sources[number - 1]}, not measured here"


def tells(recipe: Recipe, axis: str) -> bool:
    """Return whether a caption needs the value of an axis."""
    alone = {
        "noise": recipe.data.label_noise == (0.0,),
        "framework": len(recipe.frameworks) == 1,
        "width": len(recipe.widths) == 1,
        "sparsity": not recipe.has_sparsities,
    }
    return not alone.get(axis, False)


def percent(sparsity: Any) -> str:
    """Return a sparsity as tables and figures show it.

    Examples
    --------
    >>> percent(0.995), percent("2:4")
    ('99.5%', '2:4')
    """
    return sparsity if isinstance(sparsity, str) else f"{100 * sparsity:g}%"


def shown(axis: str, value: Any) -> str:
    """Return the value of an axis as tables show it."""
    if axis == "sparsity":
        return percent(value)
    if axis == "noise":
        return f"{100 * value:g}% label noise"
    if axis == "framework":
        return FRAMEWORKS[value]
    if axis == "width":
        return f"width {value:g}"
    return NAMES.get(value, value) if axis == "metric" else str(value)
