"""The cells of the comparison, by task, base optimizer, length and sparsity, and their recipes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

__all__ = ["BASES", "OURS", "TASKS", "TUNED", "Cell", "Task", "cells", "comparators", "recipe"]


class Task(NamedTuple):
    """Data, a network, and what is tried on them.

    Attributes
    ----------
    data, model : str
        TOML values of the recipe.
    lengths : mapping of str to tuple of int
        Epochs by base.
    sparsities : tuple of float or str
    chooses : bool
        Whether the constants of `safe_core.untuned` were chosen on this task. The others are
        the test.
    noise : float
        Fraction of the training labels drawn at random.
    """

    data: str
    model: str
    lengths: Mapping[str, tuple[int, ...]]
    sparsities: tuple[float | str, ...]
    chooses: bool
    noise: float = 0.0


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
_EVERY = dict.fromkeys(BASES, (60,))
_SMALL = {**_EVERY, "SGD 0.1": (20, 60, 180), "Adam 3e-3": (20, 60, 180)}
_LARGE = {"SGD 0.1": (20,), "Adam 3e-3": (20,), "AdamW 1e-3": (20,)}
_LENET = 'name = "lenet-300-100"'
_FRACTIONS = (0.8, 0.9, 0.95, 0.98, 0.99)
TASKS = {
    "digits": Task('name = "digits"', _LENET, _SMALL, _FRACTIONS, chooses=True),
    "digits, random labels": Task(
        'name = "digits"', _LENET, _SMALL, _FRACTIONS, chooses=True, noise=0.5
    ),
    "MNIST 5000": Task(
        'name = "parts.py:mnist_5000"',
        'name = "parts.py:convolutional"',
        _LARGE,
        _FRACTIONS,
        chooses=False,
    ),
    "MNIST-1D": Task(
        'name = "parts.py:mnist1d"', _LENET, {**_LARGE, "SGD 0.1": (20, 60)}, _FRACTIONS, False
    ),
    "rows of MNIST 5000": Task(
        'name = "parts.py:mnist_5000"',
        'name = "parts.py:encoder"',
        {"Adam 1e-3": (20,), "AdamW 1e-3": (20,)},
        (0.75, "2:4"),
        chooses=False,
    ),
}

PARTS, RADII = (0.3, 0.5, 0.7, 0.85), (0.05, 0.1, 0.2)
PENALTIES = (0.03, 0.1, 0.3, 1.0)
_OWN = 'method = "parts.py:{}"\n'


def _table(function: str, **values: Any) -> str:
    given = [f'{k} = "{v}"' if isinstance(v, str) else f"{k} = {v}" for k, v in values.items()]
    return _OWN.format(function) + "\n".join(given) + "\n"


def _grid(function: str, **lists: Any) -> tuple[str, ...]:
    named = [[(key, value) for value in values] for key, values in lists.items()]
    return tuple(_table(function, **dict(pairs)) for pairs in itertools.product(*named))


TUNED: dict[str, tuple[str, ...]] = {
    "magnitude, fine-tuned": _grid("gradual", part=(0.01, 0.3, 0.5, 0.7)),
    "GMP": _grid("gradual", part=PARTS),
    "GMP with SAM": _grid("gradual", part=PARTS[1:], rho=RADII),
    "IMP with SAM": _grid("rounds", count=(3, 6), rho=RADII),
    "ADMM": _grid("split", penalty=PENALTIES, schedule=("cosine", "constant")),
    "SAFE, published": _grid("split", penalty=PENALTIES, rho=RADII[1:], schedule=("cosine",)),
}
"""The tables that each comparator is chosen from, by label."""

OURS = {
    "SAFE, untuned": 'method = "safe"\n',
    "without perturbation, untuned": 'method = "admm"\n',
}


def comparators(cell: Cell) -> dict[str, tuple[str, ...]]:
    """Return the tables of the comparators that can prune to the sparsity of a cell.

    An N:M pattern has no sparsity in between, so gradual pruning is not defined for it.
    """
    if not isinstance(cell.sparsity, str):
        return TUNED
    return {label: TUNED[label] for label in ("ADMM", "SAFE, published")}


def cells() -> Iterator[Cell]:
    """Yield all cells, those of the first tasks first."""
    for name, task in TASKS.items():
        for base, lengths in task.lengths.items():
            for epochs, sparsity in itertools.product(lengths, task.sparsities):
                yield Cell(name, base, epochs, sparsity)


def recipe(cell: Cell, methods: Mapping[str, str], *, tuning: bool, framework: str) -> str:
    """Return the recipe that trains these methods, given as tables by label."""
    task = TASKS[cell.task]
    sparsity = f'"{cell.sparsity}"' if isinstance(cell.sparsity, str) else cell.sparsity
    validation = 0.25 if tuning else 0.0
    head = f"""
title = "{cell.name}"
frameworks = ["{framework}"]
sparsities = [{sparsity}]
seeds = {[3, 4] if tuning else [0, 1, 2]}
data = {{ {task.data}, label_noise = [{task.noise}], validation = {validation} }}
model = {{ {task.model} }}

[training]
epochs = {cell.epochs}
batch_size = 64
schedule = "cosine"
warmup_epochs = {max(cell.epochs // 12, 1)}
{BASES[cell.base]}
"""
    tables = (f'[[methods]]\nlabel = "{label}"\n{table}' for label, table in methods.items())
    return "\n".join([head, *tables])
