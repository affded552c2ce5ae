"""The cells of the comparison, by task, base optimizer, length and sparsity, and their recipes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

__all__ = [
    "ABLATED", "ABLATIONS", "BASES", "IN_JAX", "OURS", "PLAIN", "SAFE", "TASKS", "TUNED", "Cell",
    "Runs", "Search", "Task", "cells", "comparators", "recipe",
]  # fmt: skip


class Runs(NamedTuple):
    """Every base at every sparsity, for one length in epochs."""

    bases: tuple[str, ...]
    epochs: int
    sparsities: tuple[float | str, ...]


class Task(NamedTuple):
    """Data, a network, and what is tried on them.

    Attributes
    ----------
    data, model : str
        TOML values of the recipe.
    runs : tuple of Runs
        Bases, lengths and sparsities that are tried.
    chooses : bool
        Whether the constants of `safe_core.untuned` were chosen on this task. The others are
        the test.
    noise : float
        Fraction of the training labels drawn at random.
    dense_epochs : int
        Epochs of dense training before, with the higher learning rate of the base. All methods
        start from its network.
    """

    data: str
    model: str
    runs: tuple[Runs, ...]
    chooses: bool
    noise: float = 0.0
    dense_epochs: int = 0


class Cell(NamedTuple):
    """One task, base, length and sparsity."""

    task: str
    base: str
    epochs: int
    sparsity: float | str

    @property
    def name(self) -> str:
        """A name for its folder."""
        parts = (self.task, self.base, self.epochs, self.sparsity)
        return "-".join(str(part).replace(" ", "_").replace(":", "of") for part in parts)


BASES = {
    "SGD 0.1": 'optimizer = "sgd"\nlearning_rate = 0.1\nweight_decay = 1e-4',
    "SGD 0.03": 'optimizer = "sgd"\nlearning_rate = 0.03\nweight_decay = 1e-4',
    "Adam 3e-3": 'optimizer = "adam"\nlearning_rate = 3e-3',
    "Adam 1e-3": 'optimizer = "adam"\nlearning_rate = 1e-3',
    "AdamW 3e-3": 'optimizer = "adamw"\nlearning_rate = 3e-3\nweight_decay = 1e-2',
    "AdamW 1e-3": 'optimizer = "adamw"\nlearning_rate = 1e-3\nweight_decay = 1e-2',
}
_DENSE_RATES = {"SGD 0.03": 0.1, "Adam 1e-3": 3e-3, "AdamW 1e-3": 3e-3}
_LENET = 'name = "lenet-300-100"'
_MNIST = 'name = "parts.py:mnist_5000"'
# One base takes every sparsity. Other bases and lengths take those where methods differ.
_ALL, _HIGH, _HIGHEST = (0.8, 0.9, 0.95, 0.98, 0.99), (0.9, 0.95, 0.99), (0.95, 0.99)
_DIGITS = (
    Runs(("SGD 0.1",), 60, _ALL),
    Runs(tuple(base for base in BASES if base != "SGD 0.1"), 60, _HIGHEST),
    Runs(("SGD 0.1", "Adam 3e-3"), 20, _HIGH),
    Runs(("SGD 0.1",), 180, _HIGHEST),
    Runs(("Adam 3e-3",), 180, (0.99,)),
)
_LARGER = (Runs(("SGD 0.1",), 20, _ALL), Runs(("Adam 3e-3",), 20, _HIGHEST))
_ENCODER = (0.75, "2:4")
_FROM_SCRATCH = {
    "digits": Task('name = "digits"', _LENET, _DIGITS, chooses=True),
    "digits, random labels": Task('name = "digits"', _LENET, _DIGITS, chooses=True, noise=0.5),
    "MNIST 5000": Task(_MNIST, 'name = "parts.py:convolutional"', _LARGER, chooses=False),
    "MNIST-1D": Task(
        'name = "parts.py:mnist1d"',
        _LENET,
        (*_LARGER, Runs(("SGD 0.1",), 60, (*_HIGH, 0.98))),
        chooses=False,
    ),
    "rows of MNIST 5000": Task(
        _MNIST,
        'name = "parts.py:encoder"',
        (Runs(("Adam 1e-3",), 20, _ENCODER), Runs(("AdamW 1e-3",), 20, ("2:4",))),
        chooses=False,
    ),
}
TASKS = _FROM_SCRATCH | {
    f"{name}, from dense": task._replace(
        runs=(
            Runs(("AdamW 1e-3",), 20, _ENCODER)
            if "encoder" in task.model
            else Runs(("SGD 0.03", "Adam 1e-3"), 20, _HIGH),
        ),
        dense_epochs=60 if task.chooses else 20,
    )
    for name, task in _FROM_SCRATCH.items()
}


class Search(NamedTuple):
    """The settings that a comparator is chosen from.

    Attributes
    ----------
    function : str
        Function of ``parts.py`` that builds the method.
    first : mapping of str to tuple
        Values by parameter. Every combination is tried.
    then : mapping of str to tuple
        Further values by parameter, each tried on the best of ``first``.
    """

    function: str
    first: Mapping[str, tuple[Any, ...]]
    then: Mapping[str, tuple[Any, ...]] = {}

    def start(self) -> Iterator[dict[str, Any]]:
        """Yield every combination of ``first``."""
        for values in itertools.product(*self.first.values()):
            yield dict(zip(self.first, values, strict=True))

    def around(self, best: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the settings that differ from the best by one value of ``then``."""
        for name, values in self.then.items():
            yield from ({**best, name: value} for value in values)

    def table(self, cell: Cell, settings: Mapping[str, Any]) -> str:
        """Return the table of a method in a recipe.

        The setting ``dense`` is the part of the epochs that train a dense network first.
        """
        lines = [f'method = "parts.py:{self.function}"']
        for name, value in settings.items():
            if name == "dense":
                first = round(value * cell.epochs)
                value = f"{{ dense_epochs = {first}, epochs = {cell.epochs - first} }}"
                lines.append(f"training = {value}")
            else:
                shown = f'"{value}"' if isinstance(value, str) else value
                lines.append(f"{name} = {shown}")
        return "\n".join(lines) + "\n"


_RADII, _CONSTANT = {"rho": (0.05, 0.2)}, {"schedule": ("constant",)}
# The interval of the paper, or that of SAFE without tuning.
_SPLIT = {"penalty": (0.03, 0.1, 0.3, 1.0), "interval": (32, 0)}
_PARTS = (0.3, 0.5, 0.7)
TUNED: dict[str, Search] = {
    "magnitude, fine-tuned": Search("masked", {"dense": _PARTS}),
    "GMP": Search("gradual", {"part": (*_PARTS, 0.85)}),
    "GMP with SAM": Search("gradual", {"part": (0.5, 0.7, 0.85), "rho": (0.1,)}, _RADII),
    "IMP with SAM": Search("rounds", {"count": (3, 6), "rho": (0.1,)}, _RADII),
    "ADMM": Search("split", _SPLIT, _CONSTANT),
    "SAFE, published": Search("split", {**_SPLIT, "rho": (0.1,)}, {**_RADII, **_CONSTANT}),
}
"""Map each comparator to the settings that it is chosen from."""

SAFE, PLAIN = "SAFE, untuned", "without perturbation, untuned"
OURS = {SAFE: 'method = "safe"\n', PLAIN: 'method = "admm"\n'}

ABLATIONS = OURS | {
    label: f'method = "parts.py:changed"\npart = "{part}"\n'
    for label, part in {
        "final sparsity from the start": "rise",
        "a mask in place of the pull": "pull",
        "a tenth of the pull": "weak",
        "a quarter of the dual updates": "interval",
        "radius without regard to travel": "travel",
        "radius without regard to growth": "growth",
    }.items()
}
"""Map SAFE and its variants with one part changed to their tables."""

ABLATED = [
    *(
        Cell(task, base, epochs, sparsity)
        for task, base, epochs in (
            ("digits", "SGD 0.1", 60),
            ("digits", "Adam 1e-3", 60),
            ("digits, random labels", "SGD 0.1", 60),
            ("digits, random labels", "Adam 1e-3", 60),
            ("digits, from dense", "Adam 1e-3", 20),
            ("digits, random labels, from dense", "Adam 1e-3", 20),
        )
        for sparsity in _HIGHEST
    ),
    Cell("digits, random labels", "SGD 0.1", 180, 0.95),
    Cell("MNIST-1D", "SGD 0.1", 60, 0.95),
]
"""Cells of the ablations: tasks that the constants were chosen on, and two long runs."""


IN_JAX = [
    Cell(task, base, 60, sparsity)
    for task in ("digits", "digits, random labels")
    for base in ("SGD 0.1", "Adam 3e-3")
    for sparsity in _HIGHEST
]
"""Cells that are trained in JAX too, with other random numbers."""


def comparators(cell: Cell) -> dict[str, Search]:
    """Return the searches of the comparators of a cell.

    An N:M pattern has no sparsity in between, so gradual pruning is not defined for it: it is
    pruned at once, with and without SAM. A trained network is pruned at once, without dense
    training before.
    """
    found = dict(TUNED)
    if isinstance(cell.sparsity, str):
        del found["GMP"], found["IMP with SAM"], found["GMP with SAM"]
        found["magnitude with SAM"] = Search("masked", {"dense": _PARTS, "rho": (0.1,)}, _RADII)
    if TASKS[cell.task].dense_epochs:
        for label, search in found.items():
            first = {name: values for name, values in search.first.items() if name != "dense"}
            found[label] = search._replace(first=first)
    return found


def cells() -> Iterator[Cell]:
    """Yield all cells, those of the longest runs last."""
    found = (
        Cell(name, base, runs.epochs, sparsity)
        for name, task in TASKS.items()
        for runs in task.runs
        for base, sparsity in itertools.product(runs.bases, runs.sparsities)
    )
    yield from sorted(found, key=lambda cell: cell.epochs > 60)


def recipe(cell: Cell, methods: Mapping[str, str], *, tuning: bool, framework: str) -> str:
    """Return the recipe that trains these methods, given as tables by label."""
    task = TASKS[cell.task]
    sparsity = f'"{cell.sparsity}"' if isinstance(cell.sparsity, str) else cell.sparsity
    dense = ""
    if task.dense_epochs:
        rate = _DENSE_RATES[cell.base]
        dense = f"dense_epochs = {task.dense_epochs}\ndense_learning_rate = {rate}"
    head = f"""
title = "{cell.name}"
frameworks = ["{framework}"]
sparsities = [{sparsity}]
seeds = {[3, 4] if tuning else [0, 1, 2]}
data = {{ {task.data}, label_noise = [{task.noise}], validation = {0.25 if tuning else 0.0} }}
model = {{ {task.model} }}

[training]
epochs = {cell.epochs}
batch_size = 64
schedule = "cosine"
warmup_epochs = {max(cell.epochs // 12, 1)}
{BASES[cell.base]}
{dense}
"""
    tables = (f'[[methods]]\nlabel = "{label}"\n{table}' for label, table in methods.items())
    return "\n".join([head, *tables])
